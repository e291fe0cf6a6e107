# Firesteel with its bundled model, on Debian 13.
#
#   docker build -t firesteel . && docker run --rm -p 50051:50051 -p 9464:9464 firesteel
#
# What is verified: the set-up step below, run by hand in a bare Debian 13 root. The build and the
# library list have not been seen through there, nor has the file been through a container engine.

FROM debian:trixie-slim AS build
WORKDIR /src
# First the packages alone, so that they stay cached while sources change.
COPY tools/setup.sh tools/setup.sh
RUN tools/setup.sh
COPY . .
RUN make build TARGETS="bin/firesteel-server bin/firesteel" \
    && tools/runtime-packages.sh build/release/bin/firesteel-server build/release/bin/firesteel \
       > /runtime-packages

FROM debian:trixie-slim
RUN --mount=type=bind,from=build,source=/runtime-packages,target=/runtime-packages \
    apt-get update \
    && DEBIAN_FRONTEND=noninteractive xargs apt-get install -y --no-install-recommends < /runtime-packages \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --no-create-home --shell /usr/sbin/nologin firesteel
COPY --from=build /src/build/release/bin/firesteel-server /src/build/release/bin/firesteel /usr/local/bin/
COPY models/spark-stories /models/spark-stories
COPY LICENSE /usr/share/doc/firesteel/

USER firesteel
ENV FIRESTEEL_ADDRESS=0.0.0.0:50051 \
    FIRESTEEL_METRICS_ADDRESS=0.0.0.0:9464 \
    FIRESTEEL_MODEL=/models/spark-stories
EXPOSE 50051 9464
# SIGTERM drains: running generations finish within --drain-seconds, so give `docker stop` as long.
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=6s --start-period=30s CMD ["firesteel", "health"]
ENTRYPOINT ["firesteel-server"]
