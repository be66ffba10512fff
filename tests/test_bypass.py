"""The control of the gate's parameters: it starts as Hedgehog, has the gate's parameters, and learns."""

import torch

from hm.convert import convert, report


def test_it_starts_as_the_hedgehog_student_and_has_the_parameters_of_the_gate(teacher, ids):
    hedgehog, bypass = convert(teacher, "hedgehog"), convert(teacher, "hedgehog_bypass")
    tokens = ids(2, 20)
    torch.testing.assert_close(bypass(input_ids=tokens).logits, hedgehog(input_ids=tokens).logits)
    gate = report(convert(teacher, "gate")).counts
    assert report(bypass).counts["total"] == gate["total"]
    assert report(bypass).counts["by_part"]["bypass"] == gate["by_part"]["gate"]


def test_its_path_is_linear_and_gets_a_gradient_from_the_start(teacher, ids):
    student = convert(teacher, "hedgehog_bypass").train()
    tokens = ids(2, 21)
    student(input_ids=tokens, labels=tokens).loss.backward()
    mixer = student.mixers[0]
    assert mixer.bypass.weight.grad.abs().max() > 0
    x, zero = torch.randn(1, 5, mixer.shape.hidden_size), torch.zeros(1, 5, mixer.shape.hidden_size)
    torch.nn.init.normal_(mixer.bypass.weight)
    path = lambda u: mixer.bypass(u) - mixer.bypass(zero)  # noqa: E731
    torch.testing.assert_close(path(3 * x), 3 * path(x), rtol=1e-4, atol=1e-4)


def test_token_by_token_it_computes_what_it_computes_at_once(make_student, make_teacher, ids):
    student = make_student(make_teacher("llama"), "hedgehog_bypass")
    with torch.no_grad():
        for mixer in student.mixers:
            torch.nn.init.normal_(mixer.bypass.weight, std=0.1)
        tokens = ids(1, 9)
        whole = student(input_ids=tokens).logits
        cache, steps = None, []
        for n in range(tokens.shape[1]):
            out = student(input_ids=tokens[:, n : n + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-4)
