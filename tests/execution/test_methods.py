"""Which function does a method: its class's own, else that of the nearest built-in class."""

from types import SimpleNamespace
from typing import Literal

import pytest
from support.bench import Bench

from ctp import plugin
from ctp.cells import GPTQ, Compression, Measure, Neighbours, RandomPrompt, Recovery
from ctp.cells.cell import Compress
from ctp.execution import compress, learn, measure
from ctp.storage.ref import ref


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    for family in (Compression, Measure, Recovery):
        monkeypatch.setattr(family, "registry", dict(family.registry))


def job(**cell):
    return SimpleNamespace(cell=SimpleNamespace(**cell))


def methods(compression, recovery, measured):
    """The three families' classes, derived from these bases, with no function of their own."""

    class A(compression):
        method: Literal["a"] = "a"

    class B(recovery):
        method: Literal["b"] = "b"

    class C(measured):
        method: Literal["c"] = "c"
        batched = False

    return A, B, C


def done(spec_a, spec_b, spec_c):
    """What each family makes of them."""
    return (
        compress.compress(job(compression=spec_a)),
        learn.recover(job(recovery=spec_b)),
        measure.measure(job(measure=spec_c)),
    )


@pytest.mark.parametrize("bases", [(Compression, Recovery, Measure), (GPTQ, RandomPrompt, Neighbours)])
def test_a_class_with_its_own_function_does_it_itself(bases):
    a, b, c = methods(*bases)
    for cls, verb in ((a, "compress"), (b, "recover"), (c, "measure")):
        setattr(cls, verb, lambda self, job: {"by": self.method})
    specs = a(**({"bits": 4} if bases[0] is GPTQ else {})), b(), c()
    assert done(*specs) == ({"by": "a"}, {"by": "b"}, {"by": "c"})


def test_a_class_without_one_is_done_as_the_built_in_one_that_it_derives_from():
    a, b, c = methods(GPTQ, RandomPrompt, Neighbours)
    assert compress.builtin_compress.dispatch(a) is compress.builtin_compress.dispatch(GPTQ)
    assert learn.builtin_recover.dispatch(b) is learn.builtin_recover.dispatch(RandomPrompt)
    assert measure.builtin_measure.dispatch(c) is measure.builtin_measure.dispatch(Neighbours)


def test_a_method_that_nothing_does_says_so():
    a, b, c = (cls() for cls in methods(Compression, Recovery, Measure))
    for call, verb, spec in ((compress.compress, "compress", a), (learn.recover, "recover", b)):
        given = job(compression=spec, recovery=spec)
        with pytest.raises(NotImplementedError, match=rf"method '{spec.method}' has no {verb}\(job\)"):
            call(given)
    with pytest.raises(NotImplementedError, match=r"method 'c' has no measure\(job\)"):
        measure.measure(job(measure=c))


def test_a_method_of_ones_own_may_call_what_it_derives_from(tmp_path, llama_folder):
    class Told(GPTQ):
        method: Literal["told"] = "told"

        def compress(self, job):
            return {**plugin.builtin_compress(self, job), "own": 1.0}

    bench = Bench(tmp_path, llama_folder, compression={"method": "told", "bits": 4}, recovery=[], sources=[])
    [cell] = bench.all(Compress)
    bench.execute(cell)
    metrics = bench.store.manifest(ref(cell))["metrics"]
    assert metrics["own"] == 1.0
    assert metrics["bits_per_weight"] < 5
