"""Regional compilation and activation checkpointing: the same numbers, one graph for all layers, hooks outside.

The back end here traces, decomposes and partitions as the real one does, and needs no C++ compiler.
"""

import pytest
import torch
from torch._dynamo.utils import counters

import hm.compile
from hm.convert import convert
from hm.objectives import Align, FineTune, decoder_layers


@pytest.fixture(autouse=True)
def without_a_compiler(monkeypatch):
    monkeypatch.setattr(hm.compile, "BACKEND", "aot_eager_decomp_partition")
    counters.clear()


def gradients(objective):
    found = {n: p.grad for n, p, _ in objective.parameters}
    for _, p, _ in objective.parameters:
        p.grad = None
    return found


OBJECTIVES = {
    "stage1": lambda teacher: Align(teacher, convert(teacher, "hedgehog")),
    "stage1_student_fed": lambda teacher: Align(teacher, convert(teacher, "hedgehog"), "student"),
    "stage2": lambda teacher: FineTune(convert(teacher, keep_attention=[1]), "ce+kl", teacher),
    "one_step": lambda teacher: FineTune(convert(teacher, "mamba")),
    "adapted_teacher": lambda teacher: FineTune(teacher),
}


CASES = [("neox", name) for name in OBJECTIVES] + [("llama", "stage1"), ("llama", "stage2")]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_compiled_and_recomputed_layers_give_the_same_gradients_without_a_graph_break(kind, name, make_teacher, ids):
    objective, tokens = OBJECTIVES[name](make_teacher(kind)), ids(2, 40)
    expected = objective.backward(tokens, 1.0), gradients(objective)
    with objective.running(compile=True, checkpointing=True):
        for _ in range(2):
            found = objective.backward(tokens, 1.0), gradients(objective)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]


@pytest.mark.parametrize("make", [OBJECTIVES["stage1"], lambda teacher: FineTune(convert(teacher))], ids=["stage1", "stage2"])
def test_a_deeper_model_compiles_no_more_graphs(make, make_teacher, ids):
    graphs = []
    for layers in (2, 3):
        objective = make(make_teacher("llama", num_hidden_layers=layers))
        with objective.running(compile=True):
            counters.clear()
            objective.backward(ids(1, 20), 1.0)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] > 0


def test_hooks_on_a_compiled_layer_are_called_and_the_model_is_itself_again_afterwards(make_teacher, ids):
    objective, seen = FineTune(convert(make_teacher("llama"))), []
    names = set(objective.model.state_dict())
    with objective.running(compile=True, checkpointing=True):
        objective.backward(ids(1, 20), 1.0)
        decoder_layers(objective.model)[1].register_forward_hook(lambda *args: seen.append(1))
        objective.backward(ids(1, 20), 1.0)
        assert set(objective.model.state_dict()) == names
    assert seen == [1]
    assert all("forward" not in vars(m) for m in objective.model.modules())


def kept_bytes(objective, tokens, checkpointing):
    """Bytes that the graph of a loss keeps for its backward pass, parameters aside."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    own = {p.untyped_storage().data_ptr() for p in objective.model.parameters()}
    with objective.running(checkpointing=checkpointing), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        hidden = objective.model.backbone.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    assert hidden.requires_grad
    return sum(size for place, size in kept.items() if place not in own)


def test_checkpointing_keeps_little_more_than_the_layers_inputs(kind, make_teacher, ids):
    objective, tokens = FineTune(convert(make_teacher(kind, num_hidden_layers=4))), ids(2, 64)
    kept = {on: kept_bytes(objective, tokens, on) for on in (False, True)}
    assert kept[True] < 0.2 * kept[False]
