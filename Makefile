# Every target does its own set-up, in a virtual environment beside this file.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
STAMP = $(VENV)/.installed
# Tests start mcpctl some thousand times: it is not compiled anew each time.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test bench soak lint mcpb pictures docs clean

demo: $(STAMP)
	@exec $(BIN)/mcpctl demo --port $(or $(PORT),8080)

test: $(STAMP)
	@tests/clients/setup.sh || test $$? -eq 3
	$(BIN)/python -m pytest $(or $(ARGS),-n 3 --dist worksteal -q)

bench: $(STAMP)
	@VENV=$(VENV) benchmarks/setup.sh || test $$? -eq 3
	$(BIN)/python benchmarks/peers.py --tokens --workers 2 --report benchmarks/RESULTS.md $(ARGS)
	$(BIN)/python benchmarks/tenants.py
	$(BIN)/python benchmarks/commands.py
	$(BIN)/python benchmarks/audit.py
	$(BIN)/python benchmarks/flood.py
	$(BIN)/python benchmarks/sign_in_storm.py
	$(BIN)/python benchmarks/fronts.py --report benchmarks/fronts.md
	$(BIN)/python benchmarks/scale.py

# Half an hour: the HTTP surface under fuzzing, a bad night, and an audit log of a million lines.
soak: $(STAMP)
	ISOLATION_CALLS=20000 LOAD_SECONDS=12 $(BIN)/python -m pytest -q tests/test_tenant_isolation.py tests/test_pools_of_users.py
	$(BIN)/python benchmarks/soak.py $(ARGS)
	$(BIN)/python benchmarks/night.py $(ARGS)
	$(BIN)/python benchmarks/audit.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q tests/test_reference.py

# The desktop bundle, dist/mcpctl-VERSION.mcpb. ARGS: where it is published, for the registry's server.json.
mcpb: $(STAMP)
	@$(BIN)/python packaging/mcpb/build.py $(ARGS)

# The pictures of the README and the docs, from a demo that runs. The one of the sign-in page takes Chromium.
pictures: $(STAMP)
	$(BIN)/python docs/images/make.py

# docs/ as a site, in build/site.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --editable '.[demo]' --group dev
	@touch $(STAMP)

clean:
	rm -rf $(VENV)
