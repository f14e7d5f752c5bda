# The two commands: `make demo` and `make test`. Each sets up a fresh machine first.
VENV ?= .venv
BIN = $(VENV)/bin
export MPLBACKEND = Agg

.PHONY: demo test lab export
export: $(VENV)/.ready ## write pdae_nb/ from nbs/, formatted
	PATH="$(abspath $(BIN)):$$PATH" sh .ci/export

demo: $(VENV)/.ready   ## sample, invert and reconstruct digits with the shipped model: pictures in out/
	$(BIN)/pdae demo --out out

# One thread per process, because two processes run the tests. glibc keeps freed memory: returning
# that of every tensor to the system took a third of the CPU time of a forward pass at 64 px.
test: export OMP_NUM_THREADS = 1
test: export MALLOC_MMAP_THRESHOLD_ = 4000000000
test: export MALLOC_TRIM_THRESHOLD_ = 8000000000
test: $(VENV)/.ready   ## everything a clean checkout must pass
	$(BIN)/python .ci/sync_settings.py --check
	PATH="$(abspath $(BIN)):$$PATH" sh .ci/check_export
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --durations=20 \
		-o faulthandler_timeout=900 -o faulthandler_exit_on_timeout=true tests

lab: $(VENV)/.ready    ## the pages, in JupyterLab
	PATH="$(abspath $(BIN)):$$PATH" sh .ci/lab

$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || python3 -m venv $(VENV)
	$(BIN)/python -m pip install -q -e '.[dev]' -c constraints.txt
	touch $@
