# make train      environment, a small made data set, training of an Oct-I3D, test, report
# make test       environment, every test but the long ones
# make test-long  the tests of more networks, pages and faults: about 11 minutes
# make check      lint and the fast tests
# make lint       ruff and mypy
# make docs       the documentation's pages, in site/
# make notebooks  the notebooks of docs/, executed, with their new outputs: 4 minutes
# make release    sdist and wheel in dist/, checked, and tried in an environment of their own
# make lowest     fast tests with the oldest versions that pyproject.toml promises, in .venv-lowest
# TEST_JOBS       processes that run tests, 2 by default
# PIP_FLAGS       options for pip, such as --extra-index-url https://download.pytorch.org/whl/cpu

PYTHON ?= python3
PIP_FLAGS ?=
TEST_JOBS ?= 2
RUN = runs/quickstart
PYTEST = OMP_WAIT_POLICY=PASSIVE .venv/bin/python -m pytest -n $(TEST_JOBS) --dist worksteal
INSTALLED = .venv/.installed
# Tests that need nothing but what a plain install brings.
LOWEST = $(addprefix tests/test_,octaves.py convolution.py octavize.py sampling.py schedule.py lists.py index.py \
	multigrid.py motions.py zoo.py clips.py recognizer.py predict.py)

.PHONY: install train test test-long check lint docs notebooks release lowest clean

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
	$(PYTEST) -m "not long" --durations 20

test-long: $(INSTALLED)
	$(PYTEST) -m long

check: lint
	$(PYTEST) -m "not slow and not long" \
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

notebooks: $(INSTALLED)
	.venv/bin/python tests/notebooks.py

release: $(INSTALLED)
	PIP_FLAGS="$(PIP_FLAGS)" .ci/release

lowest:
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install $(PIP_FLAGS) --quiet --upgrade 'pip>=25' uv
	.venv-lowest/bin/uv pip install --python .venv-lowest/bin/python --resolution lowest-direct --editable . \
		'pytest>=8' 'pytest-xdist>=3.6' 'hypothesis>=6.100' 'timm>=1.0.21'
	OMP_WAIT_POLICY=PASSIVE .venv-lowest/bin/python -m pytest -n $(TEST_JOBS) --dist worksteal -m "not slow" $(LOWEST)

clean:
	rm -rf .venv .venv-lowest runs site data/motions
