# Firesteel's everyday commands. Everything is built by CMake (CMakePresets.json); this file only
# puts set-up, build and run in order. `make help` lists the commands.

PRESET ?= release
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
# Of `make test`: only the tests whose name matches this regular expression.
TESTS ?=
# Of `make bench`: further flags of firesteel-bench.
BENCH_FLAGS ?=
# Of `make build`: only these CMake targets.
TARGETS ?=

BUILD := build/$(PRESET)
SOURCES = $(shell git ls-files '*.h' '*.cc')

.DEFAULT_GOAL := build
.PHONY: help setup build run test bench lint format clean image

help: ## list these commands
	@echo "make COMMAND [PRESET=release|debug|asan|tsan] [JOBS=N]"
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1|\2/p' Makefile | awk -F'|' '{ printf "%-9s %s\n", $$1, $$2 }'

setup: ## install the Debian packages that are missing
	@tools/setup.sh

build: setup $(BUILD)/build.ninja ## set up, then build everything of the preset into build/PRESET/bin
	@cmake --build --preset $(PRESET) -j $(JOBS) $(if $(TARGETS),--target $(TARGETS))

# Ninja calls CMake again by itself when a CMakeLists.txt changes, but not when a preset does.
$(BUILD)/build.ninja: CMakePresets.json | setup
	@cmake --preset $(PRESET)
	@touch $@

run: ## build, serve the bundled model, stream one generation, serve on until Ctrl-C
	@PRESET=$(PRESET) JOBS=$(JOBS) tools/run.sh

.PHONY: setup-test
setup-test:
	@tools/setup.sh --test

test: setup-test build ## build, then run every test (TESTS=REGEX: those that match)
	@ctest --preset $(PRESET) -j $(JOBS) $(if $(TESTS),-R '$(TESTS)')

bench: build ## build, then measure the bundled model and every kernel
	@$(BUILD)/bin/firesteel-bench --model models/spark-stories $(BENCH_FLAGS)
	@set -e; for program in $(BUILD)/bin/*_bench; do echo "== $$program"; $$program; done

lint: setup-lint $(BUILD)/build.ninja ## check the format and run clang-tidy over our own sources
	@tools/lint.sh $(BUILD) $(JOBS)

.PHONY: setup-lint
setup-lint:
	@tools/setup.sh --lint

format: setup-lint ## rewrite our own sources in the project's format
	@clang-format-19 -i $(SOURCES)

clean: ## remove build/ whole
	rm -rf build

image: ## build the container image (docker, podman or buildah), and start it once
	@JOBS=$(JOBS) deploy/image/build.sh
