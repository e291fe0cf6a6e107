# Firesteel with its bundled model: the programs, the shared libraries that they load, and nothing
# else. No shell, no package manager, nothing to write to. See deploy/README.md.
#
#   make image      # docker, podman or buildah, whichever is there
#   docker run --rm --read-only -p 50051:50051 -p 9464:9464 firesteel
#
# Everything in the image is Debian 13's. For the same bytes of Debian again, build from a dated
# base and a dated archive: --build-arg BASE=debian:trixie-20250908-slim
# --build-arg DEBIAN_SNAPSHOT=20250908T000000Z. Versions are in /usr/share/doc/firesteel/packages.

ARG BASE=debian:trixie-slim

FROM ${BASE} AS build
ARG DEBIAN_SNAPSHOT=
ARG JOBS=
WORKDIR /src
# First the packages alone, so that they stay cached while sources change.
COPY tools/setup.sh tools/setup.sh
COPY deploy/image/use-snapshot.sh deploy/image/use-snapshot.sh
RUN deploy/image/use-snapshot.sh "${DEBIAN_SNAPSHOT}" && tools/setup.sh
COPY . .
# The compiler's cache outlives the step: after a change only what it touched is compiled again.
RUN --mount=type=cache,target=/root/.cache/ccache \
    make build ${JOBS:+JOBS=${JOBS}} TARGETS="bin/firesteel-server bin/firesteel bin/firesteel-convert"
RUN deploy/image/assemble.sh /image build/release/bin/firesteel-server build/release/bin/firesteel \
    build/release/bin/firesteel-convert

FROM scratch
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Firesteel" \
      org.opencontainers.image.description="Serves Spark Transformers on CPUs over gRPC" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="debian:trixie-slim"
COPY --from=build /image/ /
COPY models/spark-stories /models/spark-stories
COPY LICENSE /usr/share/doc/firesteel/

# A number, so that Kubernetes can see that it isn't root.
USER 10001:10001
ENV PATH=/usr/bin \
    FIRESTEEL_ADDRESS=0.0.0.0:50051 \
    FIRESTEEL_HEALTH_ADDRESS=127.0.0.1:50052 \
    FIRESTEEL_METRICS_ADDRESS=0.0.0.0:9464 \
    FIRESTEEL_MODEL=/models/spark-stories
EXPOSE 50051 9464
# SIGTERM drains: running generations finish within --drain-seconds (30), so give `docker stop` as
# long: --time 35.
STOPSIGNAL SIGTERM
# Asks where health is served in clear text, so that it needs no certificate, whatever clients need.
HEALTHCHECK --interval=10s --timeout=6s --start-period=60s CMD ["firesteel", "health", "--address", "127.0.0.1:50052"]
ENTRYPOINT ["firesteel-server"]
