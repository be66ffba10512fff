"""Settings: what a user may type, what follows from it, and how a wrong one is answered."""

import pytest

from hm.config import (
    GROUPS,
    MIXERS,
    Settings,
    check_names,
    from_dict,
    help_text,
    human,
    names,
    split_tokens,
    tokens,
)
from hm.errors import UserError


def resolved(**typed):
    return from_dict(typed).resolve()


def split(**typed):
    s = resolved(**typed)
    return s.budget, s.stage1_tokens, s.stage2_tokens


def refusal(**typed):
    with pytest.raises(UserError) as caught:
        resolved(**typed)
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


# --- token counts


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("50k", 50_000),
        ("20M", 20_000_000),
        ("1B", 10**9),
        ("1e9", 10**9),
        ("1E6", 10**6),
        ("1.5B", 1_500_000_000),
        ("0.3m", 300_000),
        (1000, 1000),
        (1e6, 10**6),
        ("10_000", 10_000),
        ("2 M", 2_000_000),
        ("1T", 10**12),
        ("0", 0),
        (" 7 ", 7),
    ],
)
def test_a_token_count_is_read_in_all_its_forms(text, count):
    assert tokens(text) == count
    assert isinstance(tokens(text), int)


@pytest.mark.parametrize(
    "text",
    [
        "ten",
        "-5",
        "5kk",
        "1.5",
        "1e-3",
        "",
        "k",
        "1.2.3",
        "nan",
        "inf",
        "1e400",
        "10%",
        True,
        "0x10",
        "1,000",
    ],
    ids=str,
)
def test_what_is_no_token_count_is_refused_with_the_right_forms(text):
    with pytest.raises(UserError, match=r"budget=.*write it like 50k, 20M, 1B"):
        tokens(text, "budget")


@pytest.mark.parametrize(
    ("text", "count"), [("10%", 20), ("0%", 0), ("100%", 200), ("12.5%", 25), ("33.3%", 67)]
)
def test_a_percentage_is_of_the_budget(text, count):
    assert tokens(text, budget=200) == count


@pytest.mark.parametrize("text", ["-10%", "101%", "nan%", "inf%", "ten%", "%"])
def test_a_percentage_that_is_no_part_is_refused(text):
    with pytest.raises(UserError, match="stage1_tokens="):
        tokens(text, "stage1_tokens", 1000)


@pytest.mark.parametrize(
    "count", [0, 7, 999, 1000, 1024, 50_000, 1_500_000, 20_000_000, 999_999_999, 10**9, 123_456_789_012]
)
def test_a_count_written_for_people_is_read_back_as_the_same(count):
    assert tokens(human(count)) == count


def test_counts_are_written_shortly():
    assert [human(n) for n in (50_000, 20_000_000, 1_500_000_000, 65_537)] == ["50k", "20M", "1.5B", "65537"]


# --- any two of three


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ({"budget": "20M", "stage1_tokens": "2M"}, (20_000_000, 2_000_000, 18_000_000)),
        ({"budget": "20M", "stage2_tokens": "18M"}, (20_000_000, 2_000_000, 18_000_000)),
        ({"stage1_tokens": "2M", "stage2_tokens": "18M"}, (20_000_000, 2_000_000, 18_000_000)),
        ({"budget": "20M", "stage1_tokens": "2M", "stage2_tokens": "18M"}, (20e6, 2e6, 18e6)),
        ({"budget": "20M"}, (20_000_000, 2_000_000, 18_000_000)),  # 10/90
        ({"budget": "20M", "stage1_tokens": "50%"}, (20_000_000, 10_000_000, 10_000_000)),
        ({"budget": "20M", "stage2_tokens": "90%"}, (20_000_000, 2_000_000, 18_000_000)),
        ({"budget": "20M", "stage1_tokens": 0}, (20_000_000, 0, 20_000_000)),
        ({"budget": "20M", "stage1_tokens": "100%"}, (20_000_000, 20_000_000, 0)),
        ({"default_budget": "1M"}, (1_000_000, 100_000, 900_000)),
        ({"default_budget": "1M", "stage1_tokens": "50k"}, (1_000_000, 50_000, 950_000)),
        ({"default_budget": "1M", "stage1_tokens": "10%", "stage2_tokens": "90%"}, (10**6, 10**5, 9 * 10**5)),
        ({"default_budget": "1M", "budget": "50%"}, (500_000, 50_000, 450_000)),
    ],
)
def test_any_two_of_budget_and_stages_give_the_third(typed, expected):
    assert split(**typed) == expected


def test_three_counts_that_do_not_add_up_are_refused_with_all_three():
    text = refusal(budget="20M", stage1_tokens="2M", stage2_tokens="17M")
    for part in ("budget=20M", "stage1_tokens=2M", "stage2_tokens=17M", "give two of the three"):
        assert part in text


def test_a_percentage_beside_a_count_without_a_budget_is_refused_instead_of_guessed():
    assert "don't add up" in refusal(stage1_tokens="10%", stage2_tokens="18M")


@pytest.mark.parametrize("name", ["stage1_tokens", "stage2_tokens"])
def test_a_stage_larger_than_the_budget_is_refused_by_its_name(name):
    text = refusal(budget="1M", **{name: "2M"})
    assert text.startswith(f"{name}=2M is more than the budget of 1M tokens")


@pytest.mark.parametrize(
    ("recipe", "typed", "expected"),
    [
        ("teacher", {"budget": "20M"}, (0, 0, 0)),
        ("one_step", {"budget": "20M"}, (20_000_000, 0, 20_000_000)),
        ("one_step", {"stage2_tokens": "5M"}, (5_000_000, 0, 5_000_000)),
        ("one_step", {"budget": "20M", "stage1_tokens": 0}, (20_000_000, 0, 20_000_000)),
        ("one_step", {}, (500_000, 0, 500_000)),
        ("adapted_teacher", {"budget": "20M"}, (20_000_000, 2_000_000, 18_000_000)),
        ("adapted_teacher", {"budget": "20M", "stage1_tokens": "50%"}, (20_000_000, 10_000_000, 10_000_000)),
        ("adapted_teacher", {"stage2_tokens": "5M", "stage1_tokens": "1M"}, (6_000_000, 1_000_000, 5_000_000)),
    ],
)
def test_the_other_recipes_spend_what_they_should(recipe, typed, expected):
    assert split(recipe=recipe, **typed) == expected


def test_a_one_step_cell_has_no_stage_1_and_no_two_budgets():
    assert "stage1_tokens=1M does not go with recipe=one_step" in refusal(
        recipe="one_step", stage1_tokens="1M"
    )
    assert "budget=20M and stage2_tokens=10M" in refusal(recipe="one_step", budget="20M", stage2_tokens="10M")


def test_a_stage_of_less_than_one_step_is_refused_with_the_least_that_works():
    text = refusal(stage1_tokens="1k", stage2_tokens="1M", seq_len=256)
    assert "stage1_tokens=1000" in text
    assert "2048" in text
    assert split(stage1_tokens=2048, stage2_tokens="1M", seq_len=256)[1] == 2048


def test_splitting_does_not_change_the_settings():
    s = from_dict({"budget": "20M", "mixer": "ssm"})
    before = repr(s)
    split_tokens(s)
    s.resolve()
    assert repr(s) == before


# --- mixers and recipes


@pytest.mark.parametrize("mixer", [m for m in MIXERS if m != "mamba"])
def test_a_mixers_name_switches_its_parts(mixer):
    s = resolved(mixer=mixer)
    assert {p: getattr(s, p) for p in ("ssm", "conv", "gate")} == MIXERS[mixer]


def test_a_part_can_be_switched_by_itself():
    s = resolved(mixer="hedgemamba", gate="false")
    assert (s.ssm, s.conv, s.gate) == (True, True, False)
    s = resolved(mixer="hedgehog", gate=True)
    assert (s.ssm, s.conv, s.gate) == (False, False, True)


def test_the_decays_form_is_that_of_the_ssm_if_there_is_one():
    assert resolved(decay="channel").decay == "channel"
    assert resolved(decay="channel", mixer="hedgehog").decay == "head"
    assert "decay=channel can't be had with mixer=mamba" in refusal(recipe="one_step", decay="channel")
    assert "ssm_init=decay can't be had with mixer=mamba" in refusal(recipe="one_step", ssm_init="decay")
    assert from_dict({"mixer": "hedgehog", "ssm_init": "decay"}).resolve().ssm_init == "exact"


def test_one_step_is_a_plain_mamba_and_nothing_else():
    assert resolved(recipe="one_step").mixer == "mamba"
    assert resolved(recipe="one_step", mixer="mamba").mixer == "mamba"
    assert "mixer=hedgehog" in refusal(recipe="one_step", mixer="hedgehog")
    assert "recipe=one_step" in refusal(mixer="mamba")
    assert "conv=false" in refusal(recipe="one_step", conv=False)


# --- wrong values, each with the setting, the value and the remedy


@pytest.mark.parametrize(
    ("typed", "parts"),
    [
        ({"mixer": "hedgmamba"}, ["mixer=hedgmamba", "did you mean mixer=hedgemamba"]),
        ({"recipe": "onestep"}, ["recipe=onestep", "did you mean recipe=one_step"]),
        ({"scan": "ssm"}, ["scan=ssm", "did you mean scan=ssd"]),
        ({"device": "gpu0"}, ["device=gpu0", "auto, cpu, cuda"]),
        ({"precision": "fp16"}, ["precision=fp16", "did you mean precision="]),
        ({"stage1.feed": "teachers"}, ["stage1.feed=teachers", "did you mean stage1.feed=teacher"]),
        ({"stage2": {"loss": "KL"}}, ["stage2.loss=KL", "ce, kl, ce+kl"]),
        (
            {"feature_map": {"softmax": "join"}},
            ["feature_map.softmax=join", "did you mean feature_map.softmax=joint"],
        ),
        ({"stage1.batch_size": 0}, ["stage1.batch_size=0", "at least 1"]),
        ({"stage2.micro_batch": 3}, ["stage2.micro_batch=3", "stage2.batch_size=8"]),
        ({"stage2.micro_batch": 0}, ["stage2.micro_batch=0", "divide"]),
        ({"stage2.lr": 0}, ["stage2.lr=0", "positive"]),
        ({"stage2.lr": "nan"}, ["stage2.lr=nan", "positive"]),
        ({"stage1.lr_new": -1}, ["stage1.lr_new=-1", "positive"]),
        ({"seq_len": 1}, ["seq_len=1", "at least 2"]),
        ({"seed": -1}, ["seed=-1", "between 0 and"]),
        ({"log_every": 0}, ["log_every=0", "at least 1"]),
        ({"checkpoint_every": 0}, ["checkpoint_every=0", "at least 1"]),
        ({"eval.batch_size": 0}, ["eval.batch_size=0", "at least 1"]),
        ({"eval.sequences": 0}, ["eval.sequences=0", "at least 1"]),
        ({"stage2.warmup": 1.5}, ["stage2.warmup=1.5", "between 0 and 1", "stage2.warmup=0.02"]),
        ({"stage2.warmup": "nan"}, ["stage2.warmup=nan", "between 0 and 1"]),
        ({"stage1.beta2": 1}, ["stage1.beta2=1", "between 0 and 0.99999"]),
        ({"stage1.clip": -1}, ["stage1.clip=-1", "at least 0"]),
        ({"stage2.kl_weight": 2}, ["stage2.kl_weight=2", "between 0 and 1"]),
        ({"budget": "lots"}, ["budget=lots", "20M"]),
        ({"default_budget": "lots"}, ["default_budget=lots", "20M"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_value_is_refused_with_the_setting_the_value_and_the_remedy(typed, parts):
    text = refusal(**typed)
    for part in parts:
        assert part in text


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("mixr", "mixer"),
        ("stage1_token", "stage1_tokens"),
        ("stage2.lrr", "stage2.lr"),
        ("buget", "budget"),
        ("eval.sequence", "eval.sequences"),
        ("stage3.lr", "stage[12].lr"),
        ("micro_batch", "stage[12].micro_batch"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name, nearest):
    with pytest.raises(UserError, match=rf"no setting '{name}'; did you mean {nearest}\?"):
        from_dict({name: 1})


def test_a_name_that_is_like_no_other_is_refused_without_a_guess():
    with pytest.raises(UserError, match=r"no setting 'xyzzyq' .*--help"):
        check_names(["seed", "xyzzyq"])


def test_a_group_is_not_a_setting():
    with pytest.raises(
        UserError, match=r"stage2=5 is a group of settings; name one of them, such as stage2\.lr"
    ):
        from_dict({"stage2": 5})


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("seed", "4", 4),
        ("seed", 4.0, 4),
        ("stage2.lr", "3e-4", 3e-4),
        ("stage2.lr", 1, 1.0),
        ("force", "true", True),
        ("force", "False", False),
        ("stage2.lr_new", None, None),
        ("row", None, None),
        ("teacher", 5, "5"),
        ("checkpoint_every", "1e3", 1000),
        ("keep_attention", [1, 2], [1, 2]),
        ("ssm", "null", None),
    ],
)
def test_values_take_their_settings_type(name, value, expected):
    if value == "null":
        value = None
    s = from_dict({name: value})
    group, _, leaf = name.rpartition(".")
    found = getattr(getattr(s, group) if group else s, leaf)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("seed", "one", "a whole number"),
        ("seed", 1.5, "a whole number"),
        ("seed", True, "a whole number"),
        ("seed", None, "a whole number"),
        ("seed", "nan", "a whole number"),
        ("seed", "1e400", "a whole number"),
        ("stage2.lr", "fast", "a number"),
        ("stage2.lr", [1], "a number"),
        ("force", "yes", "true or false"),
        ("force", 1, "true or false"),
        ("mixer", ["a"], "a text"),
        ("teacher", None, "a text"),
    ],
)
def test_a_value_of_another_type_is_refused_with_an_example(name, value, wanted):
    with pytest.raises(UserError) as caught:
        from_dict({name: value})
    assert (
        str(caught.value)
        == f"{name}={value} must be {wanted}, such as {name}={names()[name].metadata['example']}."
    )


def test_nested_and_dotted_names_mean_the_same():
    nested = from_dict({"stage2": {"lr": 3e-4, "loss": "kl"}, "seed": 2})
    assert nested == from_dict({"stage2.lr": 3e-4, "stage2.loss": "kl", "seed": 2})
    assert nested != from_dict({"stage1.lr": 3e-4, "stage2.loss": "kl", "seed": 2})


def test_two_settings_do_not_share_their_groups():
    first, second = Settings(), Settings()
    first.stage2.lr = 7.0
    assert second.stage2.lr != 7.0


# --- help


def test_the_help_lists_every_setting_with_its_default_its_choices_and_an_example():
    text, defaults = help_text(), Settings()
    for name, f in names().items():
        group, _, leaf = name.rpartition(".")
        default = getattr(getattr(defaults, group) if group else defaults, leaf)
        shown = (
            {None: "null", True: "true", False: "false"}.get(default, default)
            if default is None or isinstance(default, bool)
            else default
        )
        head = next(i for i, line in enumerate(text.splitlines()) if line.split()[:1] == [name])
        line, below = text.splitlines()[head : head + 2]
        assert f.metadata["help"] in line
        assert f"default: {shown} " in below
        assert f"example: {'+' if name == 'study' else ''}{name}={f.metadata['example']}" in below
        assert all(choice in below for choice in f.metadata["choices"] or ())
    assert len(text.splitlines()) == 2 * len(names())


def test_every_example_and_every_default_is_accepted():
    resolved()
    for name, f in names().items():
        example = f.metadata["example"]
        value = [3, 7, 11] if name == "keep_attention" else example
        typed = {name: value}
        if name == "recipe" or (name == "mixer" and example == "mamba"):
            typed |= {"recipe": "one_step"}
        if name.startswith("stage") and name.endswith("batch_size"):
            typed |= {"budget": "20M"}
        if name in ("stage2_tokens", "stage1_tokens", "seq_len"):
            typed |= {"budget": "20M"}
        resolved(**typed)


def test_every_group_is_known_by_its_name():
    assert {n.split(".")[0] for n in names() if "." in n} == set(GROUPS)
