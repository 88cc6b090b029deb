# Two doors to CMake. `make demo`: install what is missing, build, run the main job. `make test`: pass the tests.
.PHONY: all build demo test asan tsan coverage fuzz format format-check install clean
JOBS ?= $(shell nproc)
PREFIX ?= /usr/local
OUT ?= runs

all: build

build:
	@scripts/setup.sh build
	@cmake --preset release -DESP_TESTS=OFF >/dev/null
	@cmake --build --preset release -j $(JOBS)

demo: build
	@build/release/bin/espalier run recipes/demo/demo.yaml --output $(OUT)/demo --overwrite

test:
	@scripts/setup.sh test
	@cmake --preset release -DESP_TESTS=ON >/dev/null
	@cmake --build --preset release -j $(JOBS)
	@ctest --test-dir build/release --output-on-failure -j $(JOBS)

asan tsan coverage:
	@scripts/setup.sh test
	@cmake --preset $@ >/dev/null
	@cmake --build --preset $@ -j $(JOBS)
	@ctest --test-dir build/$@ --output-on-failure -j $(JOBS) -L 'unit|ops|adapters|optim|merge|tasks|golden|fuzz|errors'

# FUZZ_RUNS executions of each target
fuzz:
	@scripts/setup.sh test
	@scripts/fuzz.sh

SOURCES = $(shell git ls-files '*.c' '*.h' '*.cu' '*.cuh' '*.cpp')
format:
	@clang-format-14 -i $(SOURCES)
format-check:
	@scripts/setup.sh test
	@clang-format-14 --dry-run -Werror $(SOURCES)

install: build
	@cmake --install build/release --prefix $(PREFIX)

clean:
	@rm -rf build
