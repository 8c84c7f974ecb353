# The steps by name; each is a script that can be called by itself. `make ci` is what CI runs.
.PHONY: setup test lint types docs wheel ci rehearse services docker

setup: # the environment, .venv
	scripts/setup
test: # all tests
	scripts/test -n 2
lint: # style and format
	scripts/lint
types:
	scripts/types
docs: # the pages' commands, links and messages; the recipes
	scripts/test -n 2 tests/project/test_docs.py tests/project/test_readme.py tests/program/test_recipes.py
wheel: # the wheel, installed into an environment in an empty folder
	scripts/test tests/cli/test_help.py -k wheel
ci:
	.ci/run
rehearse: # a real, tiny LoRA from start to end
	scripts/rehearse
services: # image, PostgreSQL, MLflow server and browser: what needs more than Python
	scripts/check-services
docker: # the image, with Docker (docs/docker.md)
	docker compose build train
