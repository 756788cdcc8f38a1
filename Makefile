# make demo   installs into .venv and runs the main job end to end
# make test   installs what the tests need and runs lint, types and tests
# make lab    runs the tests on several hosts in namespaces, 20 to 30 minutes on two cores; needs root and Debian packages
# make soak   kills embedding, training and a Milvus server at random, ROUNDS=10 times each, from KILL_SEED if that is given,
#             and runs what takes minutes
# make bench-data  audits real text of ROWS=500000 documents: memory, what was found, and the time beside other tools
# make bench-tune  runs a sweep beside its trials one after the other: whole times and set-up of a trial, ARGS="--rounds 3"
# make bench-serve measures what the gateway costs, beside Ray Serve LLM and vLLM's own server, ARGS="--rounds 3"
# make bench-train fine-tunes beside TRL and Transformers' Trainer: tokens a second and peak memory, ARGS="--rounds 3"
# make bench-profile  what sampling at 10 Hz costs a job on all cores, and on a card where there is one
# Variables of install.sh: PYTHON, EXTRA=cpu|cuda|none, TORCH_INDEX. Demo: ARGS="--fresh".

# The environment's interpreter by a path without spaces, which Ray needs.
RUN = "$$(.venv/bin/python workbench/interpreter.py)" -m
export PYTHON EXTRA TORCH_INDEX

.PHONY: demo test lab soak bench-data bench-serve bench-train bench-profile bench-tune install lint clean

ifneq ($(EXTRA),)
ifneq ($(EXTRA),$(shell cat .venv/extra 2>/dev/null))
$(shell rm -f .venv/installed .venv/installed-dev)
endif
endif

demo: .venv/installed
	$(RUN) workbench demo $(ARGS)

test: lint
	$(RUN) pytest tests/unit --numprocesses 2 --dist loadfile $(ARGS) || [ $$? = 5 ]  # 5: ARGS leave none of them
	$(RUN) pytest tests/integration tests/lab --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lab: .venv/installed-dev
	@cd tests && LACK="$$(../.venv/bin/python -c 'from lab.lab import missing; print(missing())')"; \
	    [ -z "$$LACK" ] || { echo "$$LACK"; exit 1; }
	$(RUN) pytest tests/lab -m "lab or not lab" $(ARGS)

# What does more where KILL_ROUNDS says so: kills, requests made from the schema, ways to train alike.
REPEATED = $(patsubst %,tests/integration/test_%.py,milvus_server embed_kill train_kill gateway) \
    tests/unit/test_loss_equality.py

soak: .venv/installed-dev
	KILL_ROUNDS=$(or $(ROUNDS),10) $(RUN) pytest $(REPEATED) $(ARGS)
	KILL_ROUNDS=$(or $(ROUNDS),10) $(RUN) pytest tests/integration tests/unit -m soak $(ARGS)

bench-data: ROWS ?= 500000
bench-data: .venv/installed
	$(RUN) benchmarks.audit_size --rows $(ROWS) --folder runs/bench-data --append docs/benchmarks.md
	$(RUN) benchmarks.audit_peers --corpus runs/bench-data/corpus-$(ROWS) --append docs/benchmarks.md

bench-train: .venv/installed-dev
	$(RUN) benchmarks.train_speed --append docs/benchmarks.md $(ARGS)

bench-tune: .venv/installed
	$(RUN) benchmarks.sweep_speed --append docs/benchmarks.md $(ARGS)

bench-serve: .venv/installed
	$(RUN) benchmarks.serve_speed --append docs/benchmarks.md $(ARGS)

bench-profile: .venv/installed
	OMP_NUM_THREADS=1 $(RUN) benchmarks.profile_overhead --append docs/benchmarks.md $(ARGS)

lint: .venv/installed-dev
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt constraints-cuda.txt install.sh
	./install.sh
	touch $@

.venv/installed-dev: pyproject.toml constraints.txt constraints-cuda.txt install.sh
	./install.sh dev
	touch .venv/installed $@

clean:
	rm -rf .venv runs .workbench
