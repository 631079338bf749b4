"""The whole ring with a shadow: what its text hangs on, and what is read."""

from __future__ import annotations

import pytest
from ring import PROMPT, config, generate, outcome, plan_for
from test_shadow import make_store, settings

from pipeline.config import Config
from pipeline.ring.generation import GenerationParams
from pipeline.ring.session import Session
from storage.store import Store

pytestmark = [pytest.mark.ring, pytest.mark.kernels("a shadow is computed by them")]
EXACT = config(predictor={"kind": "all", "refine": None})


@pytest.fixture(scope="module")
def falcon(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("falcon"), "falcon-7b")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module", params=["falcon", "llama"])
def store(request: pytest.FixtureRequest) -> Store:
    found: Store = request.getfixturevalue(request.param)
    return found


def changed(share: float, **sections: dict[str, object]) -> Config:
    data = settings(share).model_dump(exclude_unset=True)
    for name, changes in sections.items():
        data[name] = {**data.get(name, {}), **changes}
    return Config.parse(data)


def test_all_full_rows_write_what_the_exact_model_writes(store):
    assert outcome(store, settings(1.0)) == outcome(store, EXACT)


def test_the_text_hangs_on_the_set_alone(store):
    expected = outcome(store, settings(0.2))
    readers = changed(0.2, prefetcher={"readers": 4, "backend": "threads", "direct": False})
    assert outcome(store, readers, slots=3, staging=4) == expected
    threads = changed(0.2, compute={"threads": 2}, cache={"half_life": 0, "hits_first": False})
    with Session(store, threads, plan_for(store, threads, slots=40)) as session:
        assert generate(session) == expected
        generate(session, 5, prompt=[7, 8, 9])
        assert generate(session) == expected  # whatever came before


def test_a_cancelled_answer_leaves_the_ring_as_it_was(falcon):
    chosen = settings(0.2)
    with Session(falcon, chosen, plan_for(falcon, chosen, slots=20)) as session:
        expected = generate(session)
        pieces = session.generate(PROMPT, GenerationParams(24, ignore_eos=True))
        next(pieces)
        pieces.close()
        assert generate(session) == expected


def test_a_token_reads_its_full_rows_and_no_others(falcon):
    chosen = settings(0.1)
    with Session(falcon, chosen, plan_for(falcon, chosen, slots=1)) as session:
        generate(session, 11)
        flash, units = session.summary().flash, sum(falcon.layout.units)
    wanted = round(0.1 * falcon.layout.most_units) * len(falcon.layout.units) * falcon.layout.stride
    assert 0.9 * wanted <= flash.bytes_per_token <= wanted < units * falcon.layout.stride


def test_without_full_rows_nothing_is_read_at_all(store):
    chosen = settings(0.0)
    with Session(store, chosen, plan_for(store, chosen)) as session:
        generate(session, 6)
        assert session.summary().flash.bytes_read == 0
