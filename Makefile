# make train    environment, a small made data set, training of an Oct-I3D, test, report
# make test     environment, every test
# make check    lint and the fast tests
# make lint     ruff and mypy
# make docs     the documentation's pages, in site/
# TEST_JOBS     processes that run tests, 2 by default
# PIP_FLAGS     options for pip, such as --extra-index-url https://download.pytorch.org/whl/cpu

PYTHON ?= python3
PIP_FLAGS ?=
TEST_JOBS ?= 2
RUN = runs/quickstart
INSTALLED = .venv/.installed

.PHONY: install train test check lint docs clean

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install $(PIP_FLAGS) --upgrade 'pip>=25' # 23's resolver finds no end
	.venv/bin/python -m pip install $(PIP_FLAGS) --editable '.[dev]'
	touch $@

train: $(INSTALLED)
	.venv/bin/octvideo motions data/motions
	rm -rf $(RUN)
	.venv/bin/python tools/train_net.py --cfg configs/quickstart.yaml
	.venv/bin/python tools/test_net.py --cfg configs/quickstart.yaml --ckpt $(RUN)/checkpoints/last.ckpt --output $(RUN)/test --report

test: $(INSTALLED)
	OMP_WAIT_POLICY=PASSIVE .venv/bin/python -m pytest -n $(TEST_JOBS) --dist worksteal

check: lint
	OMP_WAIT_POLICY=PASSIVE .venv/bin/python -m pytest -n $(TEST_JOBS) --dist worksteal -m "not slow" \
		tests/test_layering.py tests/test_octaves.py tests/test_convolution.py tests/test_octavize.py tests/test_sampling.py \
		tests/test_schedule.py tests/test_lists.py tests/test_sources.py tests/test_index.py tests/test_multigrid.py

lint: $(INSTALLED)
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy octvideo tools experiments

# The theme prints a notice about its own future without the variable.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict --quiet
	@echo "pages: site/index.html (for the search: python -m http.server --directory site)"

clean:
	rm -rf .venv runs site data/motions
