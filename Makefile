.PHONY: install check test gpu demo

install:  ## the package and what its tests need
	pip install -e ".[dev]"

check:  ## what CI checks before the tests
	ruff check . && ruff format --check . && mypy && lint-imports

test:
	pytest

gpu:  ## the tests that need a CUDA device
	pytest -m gpu

demo:
	train-clip demo
