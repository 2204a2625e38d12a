# Flynn. `make help` lists the targets.
.DEFAULT_GOAL := help
SHELL := /bin/bash
NODES ?= 1
PYTHON ?= $(shell for p in /usr/bin/python3.11 python3.11 python3; do command -v $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)

.PHONY: help setup packages images release install uninstall cluster cluster-down cluster-shell demo drill test check fmt bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: packages $(VENV)/.done ## install what Flynn needs: Debian packages, Python environment

packages: # install the Debian packages that are missing
	@missing=$$(for p in $$(cat packages.txt); do dpkg-query -W -f='$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || echo $$p; done); \
	if [ -n "$$missing" ]; then echo "=====> install" $$missing; \
	  $(SUDO) apt-get update -q -y >/dev/null && \
	  DEBIAN_FRONTEND=noninteractive $(SUDO) apt-get install -q -y --no-install-recommends $$missing >/dev/null; fi

$(VENV)/.done: pyproject.toml
	@echo "=====> install the Python environment"
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -q -e '.[node,machine,dev]'
	@touch $@

images: setup ## build the images (a second build uses the cache)
	@$(BIN)/flynn-images build

release: setup ## publish images as a signed release in build/release (keys: ~/.config/flynn/release-keys)
	@$(BIN)/flynn-images build --portable --out build/release-images
	@rm -rf build/lib build/bdist.* build/release-wheels && mkdir -p build/release-wheels && \
	  $(BIN)/pip wheel -q --use-pep517 -w build/release-wheels '.[node,machine]'
	@$(BIN)/flynn-images release --images build/release-images --wheels build/release-wheels $(if $(CHANNEL),--channel $(CHANNEL))

PREFIX ?= /opt/flynn
DESTDIR ?=
install: packages ## install flynn-host and flynn on this machine (PREFIX=/opt/flynn), without starting anything
	@[ -x $(DESTDIR)$(PREFIX)/bin/python ] || $(PYTHON) -m venv $(DESTDIR)$(PREFIX)
	@rm -rf build/lib build/bdist.*  # an earlier build's leftovers would be installed with the rest
	@$(DESTDIR)$(PREFIX)/bin/pip install -q --upgrade --force-reinstall --no-deps . && \
	  $(DESTDIR)$(PREFIX)/bin/pip install -q '.[node,machine]'
	@install -d -m 0755 $(DESTDIR)/usr/local/bin $(DESTDIR)/etc/systemd/system && install -d -m 0700 $(DESTDIR)/etc/flynn
	@ln -sfn $(PREFIX)/bin/flynn-host $(PREFIX)/bin/flynn $(DESTDIR)/usr/local/bin/
	@install -m 0644 systemd/flynn-host.service $(DESTDIR)/etc/systemd/system/
	@[ -n "$(DESTDIR)" ] || [ ! -d /run/systemd/system ] || systemctl daemon-reload
	@echo "installed; next: flynn-host init (or join), systemctl enable --now flynn-host"

uninstall: ## remove what `make install` made; /etc/flynn, /var/lib/flynn and running jobs stay
	@[ -n "$(DESTDIR)" ] || [ ! -d /run/systemd/system ] || systemctl disable --now flynn-host 2>/dev/null || true
	@rm -f $(DESTDIR)/etc/systemd/system/flynn-host.service $(DESTDIR)/usr/local/bin/flynn-host $(DESTDIR)/usr/local/bin/flynn
	@rm -rf $(DESTDIR)$(PREFIX)
	@[ -n "$(DESTDIR)" ] || [ ! -d /run/systemd/system ] || systemctl daemon-reload

cluster: images ## boot a development cluster of NODES nodes (1)
	@$(BIN)/python -m tests.cluster up $(NODES)

cluster-down: ## remove the development cluster and all it made
	@[ ! -x $(BIN)/python ] || $(BIN)/python -m tests.cluster down

cluster-shell: ## a shell on the first node
	@$(BIN)/python -m tests.cluster exec 0 bash

demo: cluster ## boot a cluster, push the sample app with git, ask for it, scale it
	@$(BIN)/python -m tests.cluster demo

check: setup ## format, lint, types, import contracts, fast tests
	@$(BIN)/ruff format --check -q . && $(BIN)/ruff check -q . && $(BIN)/mypy && $(BIN)/lint-imports && \
	  $(BIN)/pytest -q -m 'not slow and not root and not cluster and not cluster3'

fmt: setup ## format and mend what can be mended
	@$(BIN)/ruff check -q --fix . ; $(BIN)/ruff format -q .

drill: $(if $(LIST),setup,images) ## break three nodes in every way, measure the recovery; LIST=1, ONLY=name,... (build/drill.json)
	@$(BIN)/python -m tests.drill $(if $(LIST),--list) $(if $(ONLY),--only '$(ONLY)')

test: setup ## all tests, from a fresh clone (needs root)
	@bash tests/run

bench: setup $(VENV)/.bench ## measure beside the peers (ONLY="host router": some modules); writes build/bench.json
	@bench/install-packages
	@$(BIN)/python -m bench $(ONLY)

$(VENV)/.bench: pyproject.toml $(VENV)/.done
	@$(BIN)/pip install -q -e '.[bench]'
	@touch $@

clean: cluster-down ## remove what was built here (not the machine's cache)
	@rm -rf build $(VENV)
