"""Options of the pytest-benchmark runs, and the facts they record about the machine."""

from benchmarks import record
from benchmarks.cases import select_cases
from benchmarks.run import select_providers


def pytest_addoption(parser):
    group = parser.getgroup("windkern benchmarks")
    group.addoption("--cases", default="*", help="shell patterns over SHAPE/MODE/DTYPE, comma-separated")
    group.addoption("--peers", default="*", help="shell patterns over provider names, comma-separated")


def pytest_generate_tests(metafunc):
    if {"case", "provider"} <= set(metafunc.fixturenames):
        pairs = [
            (case, provider)
            for case in select_cases(metafunc.config.getoption("--cases"))
            for provider in select_providers(metafunc.config.getoption("--peers"))
            if provider.level != "floor"
        ]
        ids = [f"{case.name}-{provider.name}" for case, provider in pairs]
        metafunc.parametrize(("case", "provider"), pairs, ids=ids)


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.clear()  # pytest-benchmark would record the host name
    machine_info.update(record.machine_info(), **record.code_state())
