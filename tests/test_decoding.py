"""Drafted text is undrafted text is transformers' text, whatever is drafted."""

from __future__ import annotations

import dataclasses
import functools
import gc
import weakref

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import Given, greedy, launch_ahead, prompts_read, random_tree, read_in_parts, tiny_model
from redrafter import EagleHead, RecurrentDrafter, RedrafterError, TwoModel, generate, stream
from redrafter.core.tree import prefix_tree
from redrafter.decoding.step import Decoder
from redrafter.engine.request import request
from redrafter.engine.runner import PendingStep, Runner
from redrafter.engine.scheduler import Scheduler
from redrafter.proposers import Proposer
from redrafter.targets.target import Target

MODEL = tiny_model()


class Oracle(Proposer):
    """Proposes what the model will write, spoilt at random places, so that acceptance takes every value.

    It finds its place by the context, which it looks up among the states of the finished texts.
    """

    modules = ()

    def __init__(self, model, texts: list[list[int]], *, width: int, length: int, spoil: float = 0.0, seed: int = 0):
        self.width, self.length, self.size, self.positions = width, length, 1 + width * length, 1
        self.spoil, self.generator, self.vocabulary = (
            spoil,
            torch.Generator().manual_seed(seed),
            model.config.vocab_size,
        )
        target = Target(model)
        self.places = [(text, i) for text in texts for i in range(len(text))]
        with torch.no_grad():
            self.states = torch.cat(
                [target.hidden_states(torch.tensor([t]), torch.ones(1, len(t), dtype=torch.long))[0] for t in texts]
            )

    def propose(self, memory, place, context, draw):
        beams = torch.zeros(len(context), self.width, self.length, dtype=torch.long)
        for row, found in enumerate(torch.cdist(context[:, -1], self.states).argmin(dim=1).tolist()):
            text, position = self.places[found]
            following = torch.tensor(text[position + 2 : position + 2 + self.length])
            beams[row, :, : len(following)] = following
        spoilt = torch.rand(beams.shape, generator=self.generator) < self.spoil
        return prefix_tree(place.root, torch.where(spoilt, (beams + 1) % self.vocabulary, beams))


class AnyTree(Proposer):
    """Proposes random trees, malformed ones too, whose tokens are mostly what the model writes at their depth."""

    modules, positions = (), 1

    def __init__(self, texts: list[list[int]], *, size: int, length: int, malformed: bool, seed: int):
        self.texts, self.size, self.length, self.malformed = texts, size, length, malformed
        self.generator = torch.Generator().manual_seed(seed)

    def propose(self, memory, place, context, draw):
        batch = len(place.row)
        tree = random_tree(batch, self.size, vocabulary=80, malformed=self.malformed, generator=self.generator)
        tokens = tree.tokens - 8  # some lie outside the vocabulary of 64
        for row, (number, length) in enumerate(zip(place.row.tolist(), place.length.tolist(), strict=True)):
            rest = torch.tensor([*self.texts[number][length:], 0])
            known = torch.rand(self.size, generator=self.generator) < 0.8
            tokens[row] = torch.where(known, rest[tree.depth[row].clamp(0, len(rest) - 1)], tokens[row])
        if self.malformed:  # an own root that is wrong is reported, not decoded
            tree.depth[:, 0], tree.ancestors[:, 0] = 0, torch.arange(self.size) == 0
        return dataclasses.replace(tree, tokens=tokens)


prompts_strategy = st.lists(st.lists(st.integers(3, 60), min_size=1, max_size=12), min_size=1, max_size=4)


@functools.cache
def undrafted(count, options):
    return generate(MODEL, None, [[5, 9, 12], [7], [8, 8, 4, 3]], max_new_tokens=count, **dict(options))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 5),
    st.booleans(),
    st.sampled_from([{}, {"do_sample": True, "seed": 3}, {"no_repeat_ngram_size": 2}, {"repetition_penalty": 1.3}]),
    st.integers(0, 2**31),
)
def test_any_tree_gives_the_same_text(size, length, malformed, options, seed):
    """Equal siblings, invalid nodes between others, wrong parents, depths, ancestors and tokens."""
    prompts, count = [[5, 9, 12], [7], [8, 8, 4, 3]], 12
    expected = undrafted(count, tuple(options.items()))
    texts = [prompt + new for prompt, new in zip(prompts, expected.new_tokens, strict=True)]
    proposer = AnyTree(texts, size=size, length=length, malformed=malformed, seed=seed)
    found = generate(MODEL, Given(proposer), prompts, max_new_tokens=count, **options)
    assert found.new_tokens == expected.new_tokens
    if size > 8 and not malformed:
        assert found.stats.accepted > 0


@pytest.mark.parametrize("field", ["depth", "ancestors"])
def test_a_malformed_root_is_an_error(field):
    class Wrong(AnyTree):
        def propose(self, *arguments):
            tree = super().propose(*arguments)
            getattr(tree, field)[:, 0] = 1
            return tree

    with pytest.raises(RedrafterError, match="malformed tree for row 0"):
        generate(MODEL, Given(Wrong([[5, 9]], size=4, length=2, malformed=False, seed=0)), [[5, 9]], max_new_tokens=4)


@pytest.mark.parametrize("wrong", ["size", "rows", "type"])
def test_a_tree_of_another_form_is_an_error(wrong):
    class Wrong(AnyTree):
        def propose(self, *arguments):
            tree = super().propose(*arguments)
            if wrong == "size":
                self.size -= 1
                return tree
            if wrong == "rows":
                fields = {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree)}
                return type(tree)(
                    **{name: value if value is None else torch.cat((value, value)) for name, value in fields.items()}
                )
            return dataclasses.replace(tree, depth=tree.depth.int())

    with pytest.raises(RedrafterError, match="tree"):
        generate(MODEL, Given(Wrong([[5, 9]], size=4, length=2, malformed=False, seed=0)), [[5, 9]], max_new_tokens=4)


@settings(max_examples=25)
@given(
    prompts_strategy, st.integers(1, 20), st.integers(1, 5), st.integers(1, 4), st.floats(0, 1), st.integers(0, 2**31)
)
def test_any_draft_gives_the_text_of_transformers(prompts, count, width, length, spoil, seed):
    expected = [greedy(MODEL, prompt, count) for prompt in prompts]
    texts = [prompt + new for prompt, new in zip(prompts, expected, strict=True)]
    oracle = Oracle(MODEL, texts, width=width, length=length, spoil=spoil, seed=seed)
    drafted = generate(MODEL, Given(oracle), prompts, max_new_tokens=count)
    assert drafted.new_tokens == expected
    assert generate(MODEL, None, prompts, max_new_tokens=count).new_tokens == expected


@settings(max_examples=15)
@given(prompts_strategy, st.integers(1, 8), st.integers(1, 4), st.integers(0, 30), st.integers(0, 2**31))
def test_a_recurrent_drafter_gives_the_text_of_transformers(prompts, width, length, spare, seed):
    torch.manual_seed(seed)
    drafter = RecurrentDrafter.for_target(MODEL)
    shape = {"beam_width": width, "beam_length": length} | ({"node_budget": length + spare} if spare else {})
    drafted = generate(MODEL, drafter, prompts, max_new_tokens=12, **shape)
    assert drafted.new_tokens == [greedy(MODEL, prompt, 12) for prompt in prompts]


@pytest.mark.parametrize("family", ["mistral", "qwen3", "gemma3_text", "gpt2"])
def test_families_past_their_windows(family):
    changes = {"sliding_window": 6} if family == "mistral" else {}
    model = tiny_model(family, **changes)
    prompts = [list(range(3, 23)), [9, 8, 7]]
    expected = [greedy(model, prompt, 16) for prompt in prompts]
    torch.manual_seed(0)
    drafter = RecurrentDrafter.for_target(model)
    assert generate(model, drafter, prompts, max_new_tokens=16).new_tokens == expected
    assert generate(model, None, prompts, max_new_tokens=16).new_tokens == expected


def test_counts_of_a_perfect_drafter():
    prompt = [5, 9, 12]
    new = greedy(MODEL, prompt, 40)
    oracle = Oracle(MODEL, [prompt + new], width=1, length=3)
    out = generate(MODEL, Given(oracle), [prompt], max_new_tokens=13)
    assert out.new_tokens == [new[:13]]
    stats = out.stats
    assert (stats.steps, stats.tokens, stats.drafted, stats.accepted) == (4, 13, 12, 10)  # three times 3 + 1, then 1
    assert stats.accepted_by_position == [4, 3, 3]
    assert stats.tokens_per_step == 13 / 4
    assert stats.rows[0].steps == 4
    assert 0 < stats.rows[0].seconds <= stats.seconds


@pytest.mark.parametrize("count", range(1, 10))
def test_the_budget_cuts_a_step_that_accepts_more(count):
    prompt = [5, 9, 12]
    new = greedy(MODEL, prompt, 40)
    oracle = Oracle(MODEL, [prompt + new], width=2, length=4)
    out = generate(MODEL, Given(oracle), [prompt], max_new_tokens=count)
    assert out.new_tokens == [new[:count]]
    assert out.finish_reasons == ["length"]
    assert out.stats.tokens == count
    assert out.stats.accepted <= count
    assert out.stats.steps == -(-count // 5)


def test_autoregressive_decoding_counts_one_token_a_step():
    stats = generate(MODEL, None, [[3, 4], [5]], max_new_tokens=7).stats
    assert (stats.steps, stats.tokens, stats.drafted, stats.accepted) == (14, 14, 0, 0)
    assert stats.accepted_by_position == []
    assert [row.tokens for row in stats.rows] == [7, 7]


@functools.cache
def greedy_twenty(prompt):
    return greedy(MODEL, list(prompt), 20)


@given(st.integers(0, 19), st.floats(0, 1), st.integers(0, 2**31))
@settings(max_examples=20)
def test_each_row_ends_at_its_own_end_token(place, spoil, seed):
    prompts = [[5, 9, 12], [7], [30, 31, 32, 33, 34]]
    plain = [greedy_twenty(tuple(prompt)) for prompt in prompts]
    end = plain[1][place]
    oracle = Oracle(
        MODEL, [p + n for p, n in zip(prompts, plain, strict=True)], width=2, length=3, spoil=spoil, seed=seed
    )
    out = generate(MODEL, Given(oracle), prompts, max_new_tokens=20, eos_token_id=end)
    for new, reason, full in zip(out.new_tokens, out.finish_reasons, plain, strict=True):
        stop = full.index(end) + 1 if end in full else 20
        assert new == full[:stop]
        assert reason == ("eos" if end in full else "length")


def test_several_end_tokens_and_none():
    new = generate(MODEL, None, [[5, 9, 12]], max_new_tokens=10).new_tokens[0]
    first = min(new.index(new[4]), new.index(new[7]))
    assert generate(MODEL, None, [[5, 9, 12]], max_new_tokens=10, eos_token_id=[new[4], new[7]]).new_tokens == [
        new[: first + 1]
    ]
    model = tiny_model()
    model.generation_config.eos_token_id = new[0]
    assert generate(model, None, [[5, 9, 12]], max_new_tokens=10).new_tokens == [new[:1]]
    assert generate(model, None, [[5, 9, 12]], max_new_tokens=10, eos_token_id=()).new_tokens == [new]


@pytest.mark.parametrize("length", [20, 29, 30, 31, 32])
def test_the_context_is_used_to_its_last_slot(length):
    model = tiny_model(max_position_embeddings=32)
    prompt = list(range(3, 3 + length))
    torch.manual_seed(0)
    drafter = RecurrentDrafter.for_target(model)
    expected = greedy(model, prompt, 33 - length)
    for head in (None, drafter):
        out = generate(model, head, [prompt, [5]], max_new_tokens=50)
        assert out.new_tokens[0] == expected
        assert out.finish_reasons[0] == "length"
        assert len(out.new_tokens[1]) == 32


def test_longrope_is_decoded_in_its_original_context():
    """Beyond it every position of every row would turn otherwise, so no draft and no neighbour may reach there."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [9.0] * 4}
    model = tiny_model("phi3", rope_parameters=rope, original_max_position_embeddings=24)
    prompts = [[5, 9, 12], list(range(3, 20))]
    expected = [greedy(model, prompt, 25 - len(prompt)) for prompt in prompts]
    for drafter in (None, TwoModel(model)):
        assert generate(model, drafter, prompts, max_new_tokens=30).new_tokens == expected
    with pytest.raises(RedrafterError, match="row 0 has 25 tokens, the model's context 24"):
        generate(model, None, [[5] * 25])


def test_padding_on_either_side_is_no_part_of_a_prompt():
    rows = [[5, 9, 12, 3], [7, 8]]
    expected = generate(MODEL, None, rows, max_new_tokens=6)
    for padded, mask in (([7, 8, 0, 0], [1, 1, 0, 0]), ([0, 0, 7, 8], [0, 0, 1, 1]), ([0, 7, 8, 0], [0, 1, 1, 0])):
        ids, attention = torch.tensor([rows[0], padded]), torch.tensor([[1, 1, 1, 1], mask])
        assert generate(MODEL, None, ids, attention, max_new_tokens=6).new_tokens == expected.new_tokens
    assert expected.sequences.tolist() == [rows[0] + expected.new_tokens[0], [*rows[1], *expected.new_tokens[1], 0, 0]]
    assert generate(MODEL, None, rows, max_new_tokens=6, pad_token_id=33).sequences[1, -2:].tolist() == [33, 33]


@pytest.mark.parametrize("batch_size", [1, 2, 4])
@pytest.mark.parametrize(("first", "later"), [(1, 1), (4, 4), (11, 3), (3, 11), (27, 27)])
@pytest.mark.parametrize("method", ["none", "recurrent", "eagle", "two models"])
def test_a_prompt_that_is_read_in_parts_gives_the_same_text(method, first, later, batch_size, monkeypatch):
    """Alone, or between the steps of other rows."""
    prompts = [list(range(3, 30)), [4, 5], list(range(10, 21)), [6]]
    expected = [greedy(MODEL, prompt, 8) for prompt in prompts]
    torch.manual_seed(0)
    drafter = {
        "none": None,
        "recurrent": RecurrentDrafter.for_target(MODEL),
        "eagle": EagleHead.fresh(MODEL),
        "two models": TwoModel(MODEL),
    }[method]
    whole = generate(MODEL, drafter, prompts, max_new_tokens=8, batch_size=batch_size)
    read_in_parts(monkeypatch, first, later)
    reads = []
    read = Runner.read
    monkeypatch.setattr(Runner, "read", lambda own, parts: reads.append(parts) or read(own, parts))
    found = generate(MODEL, drafter, prompts, max_new_tokens=8, batch_size=batch_size)
    assert whole.new_tokens == found.new_tokens == expected
    assert found.stats.accepted_by_position == whole.stats.accepted_by_position
    parts = [part for parts in reads for part in parts]
    assert all(part.stop - part.start <= (later if part.start else first) for part in parts)
    for prompt in prompts:  # each is read once, in order, up to its last token
        own = [(part.start, part.stop) for part in parts if part.row.prompt == prompt]
        assert [position for start, stop in own for position in range(start, stop)] == [*range(len(prompt) - 1)]


def test_rows_go_on_between_the_parts_of_a_long_prompt(monkeypatch):
    """A row that is being decoded waits for no more than one part between two of its steps."""
    read_in_parts(monkeypatch, 4, 4)
    log = []
    read, step = Runner.read, Decoder.step
    monkeypatch.setattr(Runner, "read", lambda own, parts: log.append("read") or read(own, parts))
    monkeypatch.setattr(Decoder, "step", lambda *args: log.append("step") or step(*args))
    prompts = [[5, 9, 12], [7], list(range(3, 44))]
    asked = request(MODEL, None, prompts, max_new_tokens=20)
    asked.tasks[1].row = dataclasses.replace(asked.tasks[1].row, budget=3)
    run = Scheduler(Runner({1: asked.decoder}, batch=2, slots=64), read_tokens=4)
    for task in asked.tasks:
        run.add(task)
    new = {row: [] for row in range(3)}
    while not run.idle:
        for _, event in run.step():
            new[event.row] += event.tokens
    assert new == {
        row: greedy(MODEL, prompt, count) for row, (prompt, count) in enumerate(zip(prompts, (20, 3, 20), strict=True))
    }
    assert log == ["read", *["step"] * 3, *["read", "step"] * 10, *["step"] * 19]


def test_the_stream_is_the_text_in_pieces():
    torch.manual_seed(0)
    drafter = RecurrentDrafter.for_target(MODEL)
    prompts = [[5, 9, 12], [7]]
    out = generate(MODEL, drafter, prompts, max_new_tokens=15)
    events = list(stream(MODEL, drafter, prompts, max_new_tokens=15))
    for row in range(2):
        own = [event for event in events if event.row == row]
        assert [token for event in own for token in event.tokens] == out.new_tokens[row]
        assert [event.finish_reason for event in own] == [None] * (len(own) - 1) + ["length"]
        assert all(len(event.tokens) in (event.accepted, event.accepted + 1) for event in own)


def test_events_carry_text_and_what_was_drafted(model_folder, drafter_folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    drafter = RecurrentDrafter.from_pretrained(drafter_folder, target=model)
    told = {"max_new_tokens": 24, "tokenizer": tokenizer}
    out = generate(model, drafter, [[5, 9], [7], [8]], batch_size=2, **told)
    assert out.texts == [tokenizer.decode(new, skip_special_tokens=True) for new in out.new_tokens]
    events = list(stream(model, drafter, [[5, 9], [7], [8]], batch_size=2, **told))
    for row in range(3):
        own = [event for event in events if event.row == row]
        assert "".join(event.text for event in own) == out.texts[row]
        assert sum(event.drafted for event in own) == out.stats.rows[row].drafted > 0
        assert own[-1].finish_reason == "length"
    assert generate(model, drafter, [[5]], max_new_tokens=2).texts is None


def test_a_stop_string_ends_a_row_where_it_ends_it_without_drafting(model_folder):
    """Inside a drafted block too; the criterion is transformers' own."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    prompt, count = [40, 41, 42], 60
    written = greedy(model, prompt, count)
    oracle = Oracle(model, [prompt + written], width=2, length=5, spoil=0.1)
    lengths = set()
    strings = {tokenizer.decode(written[cut : cut + 2]) for cut in range(count - 2)}
    for string in sorted(string for string in strings if "\N{REPLACEMENT CHARACTER}" not in string):
        told = {"max_new_tokens": count, "stop_strings": [string, "never"], "tokenizer": tokenizer}
        ids = torch.tensor([prompt])
        expected = model.generate(ids, attention_mask=ids * 0 + 1, do_sample=False, pad_token_id=0, **told)
        out = generate(model, Given(oracle), [prompt, [50]], **told)
        assert out.new_tokens[0] == expected[0, 3:].tolist()
        assert out.finish_reasons[0] == "stop"
        assert string in out.texts[0]
        lengths.add(len(out.new_tokens[0]))
    assert len(lengths) > 5


class Listener(transformers.generation.streamers.BaseStreamer):
    """Notes what it is given."""

    def __init__(self):
        self.heard = []

    def put(self, value):
        assert value.device.type == "cpu"
        self.heard.append(value.tolist())

    def end(self):
        self.heard.append("end")


@pytest.mark.parametrize("batch_size", [None, 1])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_streamer_is_given_what_transformers_gives_it(rows, batch_size):
    """Prompts, one token of every row at a time, padding where a row has ended, and the end once."""
    ids = torch.tensor([[5, 9, 12], [0, 7, 8], [30, 31, 32]])[:rows]
    told = {"max_new_tokens": 12, "eos_token_id": [34, 20], "pad_token_id": 0, "do_sample": False}
    theirs, ours = Listener(), Listener()
    MODEL.generate(ids, attention_mask=(ids != 0).long(), streamer=theirs, **told)
    head = RecurrentDrafter.for_target(MODEL)
    generate(MODEL, head, ids, (ids != 0).long(), streamer=ours, batch_size=batch_size, **told)
    assert ours.heard == theirs.heard
    assert len(ours.heard) > 3


def test_the_reader_of_a_streamer_does_not_wait_after_an_error(model_folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_folder)
    for rows, told in (([[5]], {"num_beams": 2}), ([[5, 61]], {}), ([[5]] * 2, {})):
        streamer = transformers.TextIteratorStreamer(tokenizer, timeout=10)
        with pytest.raises(RedrafterError):
            generate(MODEL, None, rows, streamer=streamer, max_new_tokens=3, **told)
        assert "".join(streamer) == ""


def test_a_criterion_sees_the_scores_that_are_asked_for():
    """A tuple of [1, V] for each token so far, as from transformers, also inside a draft; or None."""

    class Unsure(transformers.StoppingCriteria):
        def __init__(self, seen):
            self.seen = seen

        def __call__(self, input_ids, scores, **kwargs):
            self.seen.append(None if scores is None else torch.stack(scores))
            return torch.tensor([scores is not None and len(scores) > 2 and float(scores[-1].max()) < BOUND])

    ids = torch.tensor([[5, 9, 12]])
    told = {"max_new_tokens": 14, "do_sample": False, "pad_token_id": 0, "repetition_penalty": 1.2}
    asked = {"output_scores": True, "return_dict_in_generate": True}
    best = [float(one.max()) for one in MODEL.generate(ids, **told, **asked).scores]
    BOUND = sorted(best[2:])[3] + 1e-3
    theirs, ours, none = [], [], []
    expected = MODEL.generate(ids, **told, **asked, stopping_criteria=[Unsure(theirs)]).sequences
    for head in (None, RecurrentDrafter.for_target(MODEL)):
        ours.clear()
        out = generate(MODEL, head, ids, **told, output_scores=True, stopping_criteria=[Unsure(ours)])
        assert out.sequences.tolist() == expected.tolist()
        assert out.finish_reasons == ["stop"]
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)
    generate(MODEL, None, ids, **told, stopping_criteria=[Unsure(none)])
    assert none == [None] * 14


def test_scores_of_a_low_precision_are_float32_as_in_transformers():
    model = tiny_model().to(torch.bfloat16)
    out = generate(model, None, [[5]], max_new_tokens=3, output_scores=True, output_logits=True)
    assert out.scores[0].dtype == out.logits[0].dtype == torch.float32


def test_a_consumer_that_stops_early_leaves_all_as_it_was():
    model = tiny_model().train()
    events = stream(model, None, [[5, 9]], max_new_tokens=15)
    next(events)
    events.close()
    assert model.training
    assert not model.lm_head._forward_pre_hooks


def test_a_stream_that_ends_leaves_another_in_evaluation_mode():
    model = tiny_model(attention_dropout=0.5).train()
    model.model.norm.eval()
    modes = [part.training for part in model.modules()]
    expected = generate(model, None, [[5, 9]], max_new_tokens=12).new_tokens[0]
    first, second = (stream(model, None, [[5, 9]], max_new_tokens=12) for _ in range(2))
    next(first)
    written = next(second).tokens
    first.close()
    assert written + [token for event in second for token in event.tokens] == expected
    assert [part.training for part in model.modules()] == modes


def test_the_cache_is_freed_with_the_last_event(monkeypatch):
    caches = []
    new_cache = Target.new_cache

    def watched(self, **sizes):
        cache = new_cache(self, **sizes)
        caches.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(Target, "new_cache", watched)
    gc.disable()
    try:
        generate(MODEL, RecurrentDrafter.for_target(MODEL), [[5, 9]], max_new_tokens=5)
        assert [alive() for alive in caches] == [None] * len(caches)
        assert caches
    finally:
        gc.enable()


def test_low_precision_decodes():
    model = tiny_model().to(torch.bfloat16)
    drafter = RecurrentDrafter.for_target(model).to(torch.bfloat16)
    assert len(generate(model, drafter, [[5, 9, 12]], max_new_tokens=9).new_tokens[0]) == 9


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_autocast_decodes_and_leaves_later_calls_alone(family):
    """What layers keep under it is rounded; what is known of the model without it is not."""
    model = tiny_model(family)
    drafter = TwoModel(model)
    with torch.autocast("cpu", torch.bfloat16):
        first = greedy(model, [5, 9, 12], 1)
        assert generate(model, drafter, [[5, 9, 12]], max_new_tokens=9).new_tokens[0][:1] == first
    with torch.no_grad():
        plain = model(torch.tensor([[5, 9, 12]])).logits[0, -1:]
    out = generate(model, drafter, [[5, 9, 12]], max_new_tokens=2, output_logits=True)
    torch.testing.assert_close(out.logits[0][:1], plain, atol=1e-4, rtol=1e-4)
    again = greedy(model, [5, 9, 12], 9)
    assert generate(model, drafter, [[5, 9, 12]], max_new_tokens=9).new_tokens == [again]


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("drafting", [False, True])
@pytest.mark.parametrize("sampling", [False, True])
def test_a_step_asks_the_device_nothing(drafting, sampling):
    model = tiny_model().cuda()
    drafter = RecurrentDrafter.for_target(model, beam_width=4, beam_length=3) if drafting else None
    told = {"repetition_penalty": 1.3} | ({"do_sample": True, "top_k": 20, "seed": [1, 2]} if sampling else {})
    asked = request(model, drafter, [[5, 9, 12], [7]], **told)
    steps = prompts_read(asked)
    state, decoder = steps.state, steps.decoders[1]
    with steps.running():
        state.set_visible(state.cache.slots)
        decoder.step(state, asked.sampler)  # what is built on first use may ask
        torch.cuda.synchronize()
        try:
            torch.cuda.set_sync_debug_mode("error")
            decoder.step(state, asked.sampler)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3_text", "gpt2"])
def test_on_a_gpu_text_is_that_of_transformers(family):
    model = tiny_model(family, **({"sliding_window": 6} if family == "mistral" else {})).cuda()
    prompts = [list(range(3, 23)), [9, 8, 7], [5]]
    expected = [
        model.generate(torch.tensor([p]).cuda(), do_sample=False, max_new_tokens=30, pad_token_id=0)[
            0, len(p) :
        ].tolist()
        for p in prompts
    ]
    torch.manual_seed(0)
    drafter = RecurrentDrafter.for_target(model)
    assert generate(model, None, prompts, max_new_tokens=30).new_tokens == expected
    assert generate(model, drafter, prompts, max_new_tokens=30).new_tokens == expected


MANY = [[5, 9, 12], [7], [30, 31, 32, 33, 34], [8, 8], [11], [40, 41, 42], [3] * 9]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 6, 7, 20])
@pytest.mark.parametrize("drafting", [False, True])
@pytest.mark.parametrize("law", [{}, {"do_sample": True, "seed": 3}])
def test_waiting_prompts_enter_free_slots_and_no_text_depends_on_neighbours(batch_size, drafting, law):
    plain = [greedy(MODEL, prompt, 12) for prompt in MANY]
    end = plain[2][3]  # rows end at different times
    torch.manual_seed(0)
    drafter = RecurrentDrafter.for_target(MODEL) if drafting else None
    settings = {"max_new_tokens": 12, "eos_token_id": end, **law}
    out = generate(MODEL, drafter, MANY, batch_size=batch_size, **settings)
    assert out.new_tokens == generate(MODEL, None, MANY, **settings).new_tokens
    assert [row.tokens for row in out.stats.rows] == [len(new) for new in out.new_tokens]
    if not law:
        assert out.new_tokens == [new[: new.index(end) + 1] if end in new else new for new in plain]


@pytest.mark.parametrize("batch_size", [1, 3, 7])
@pytest.mark.parametrize("drafting", [False, True])
@pytest.mark.parametrize("law", [{}, {"do_sample": True, "seed": 3}])
def test_a_step_launched_before_the_last_was_read_changes_no_text(batch_size, drafting, law, monkeypatch):
    plain = [greedy(MODEL, prompt, 12) for prompt in MANY]
    drafter = Given(Oracle(MODEL, [p + n for p, n in zip(MANY, plain, strict=True)], width=2, length=3, spoil=0.3))
    settings = {"max_new_tokens": 12, "eos_token_id": plain[2][3], **law}
    expected = generate(MODEL, None, MANY, **settings)
    launch_ahead(monkeypatch)
    log: list[str] = []
    step, result = Decoder.step, PendingStep.result
    monkeypatch.setattr(Decoder, "step", lambda *args: log.append("launched") or step(*args))
    monkeypatch.setattr(PendingStep, "result", lambda pending: log.append("read") or result(pending))
    found = generate(MODEL, drafter if drafting else None, MANY, batch_size=batch_size, **settings)
    assert found.new_tokens == expected.new_tokens
    assert found.finish_reasons == expected.finish_reasons
    assert "launched launched read" in " ".join(log)
    assert "launched launched launched" not in " ".join(log)


def test_no_step_is_launched_that_no_budget_has_room_for(monkeypatch):
    launch_ahead(monkeypatch)
    steps = []
    step = Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda *args: steps.append(args) or step(*args))
    generate(MODEL, None, MANY[:2], max_new_tokens=9)
    assert len(steps) == 9


@pytest.mark.parametrize("reason", ["eos", "length"])
def test_processors_see_no_text_beyond_its_end(reason):
    """What a draft holds after an end token or the last token that a row may write is not asked about."""
    prompt = [5, 9, 12]
    new = greedy(MODEL, prompt, 20)
    oracle = Oracle(MODEL, [prompt + new], width=1, length=4)
    count = next(i for i in range(2, 10) if new[i] not in new[:i]) + 1  # inside of a draft that is accepted whole
    seen = []

    class Watch(transformers.LogitsProcessor):
        def __call__(self, ids, scores):
            seen.append(ids[0, len(prompt) :].tolist())
            return scores

    told = {"eos_token_id": new[count - 1]} if reason == "eos" else {"max_new_tokens": count}
    out = generate(MODEL, Given(oracle), [prompt], logits_processor=[Watch()], **told)
    assert (out.new_tokens, out.finish_reasons) == ([new[:count]], [reason])
    assert seen == [new[:i] for i in range(count)]


def test_what_was_not_chosen_after_an_end_is_in_no_later_text():
    """A head that reads a prompt reads what stands behind it, too: there a row ended before in the same slot."""
    model = tiny_model(vocab_size=9)
    torch.manual_seed(0)
    head = EagleHead.fresh(model, beam_width=8, beam_length=3)
    told = {"max_new_tokens": 12, "batch_size": 1, "no_repeat_ngram_size": 5}  # so that nodes are walked one by one
    new = generate(model, None, [[5]], **told).new_tokens[0]
    places = [i for i in range(1, 10) if new[i] not in new[:i]]
    assert len(places) > 2
    for place in places:
        prompts = [[5], [4] * (place + 2)]  # which ends right before what follows the first row's end
        plain = generate(model, None, prompts, eos_token_id=new[place], **told)
        assert generate(model, head, prompts, eos_token_id=new[place], **told).new_tokens == plain.new_tokens


def test_what_cannot_be_chosen_after_an_end_is_no_error():
    """Also where processors run over all nodes at once."""
    prompt = [5, 9, 12]
    new = greedy(MODEL, prompt, 20)
    oracle = Oracle(MODEL, [prompt + new], width=1, length=4)
    count = next(i for i in range(2, 5) if new[i] not in new[:i]) + 1

    def spoil(module, args, output):
        output[output.argmax(dim=-1) == new[count]] = float("nan")
        return output

    handle = MODEL.lm_head.register_forward_hook(spoil)
    try:
        out = generate(MODEL, Given(oracle), [prompt], eos_token_id=new[count - 1])
    finally:
        handle.remove()
    assert out.new_tokens == [new[:count]]


def test_a_row_that_ended_troubles_no_other():
    """It stood beyond what attention still saw, and in double precision its logits were no numbers."""
    model = tiny_model("mistral", sliding_window=6, attn_implementation="eager").double()
    prompts = [list(range(3, 40)), [9, 8, 7]]
    told = {"do_sample": True, "eta_cutoff": 1e-3, "seed": [1, 2], "max_new_tokens": 9}  # it takes numbers alone
    plain = generate(model, None, prompts[1:], **told | {"seed": [2]}).new_tokens[0]
    end = generate(model, None, prompts, **told | {"max_new_tokens": 1}).new_tokens[0][0]
    assert end not in plain
    for drafter in (None, TwoModel(model)):
        assert generate(model, drafter, prompts, eos_token_id=end, **told).new_tokens == [[end], plain]


def test_a_row_that_ended_stays_where_it_is(monkeypatch):
    lengths = []
    step = Decoder.step

    def watched(decoder, state, *args):
        emitted = step(decoder, state, *args)
        lengths.extend(state.rows.length[state.rows.alive == 0].tolist())
        return emitted

    monkeypatch.setattr(Decoder, "step", watched)
    end = greedy(MODEL, MANY[2], 12)[3]
    generate(MODEL, TwoModel(MODEL), MANY, max_new_tokens=12, eos_token_id=end)
    assert lengths == [1] * len(lengths) != []


def test_no_slot_idles_while_a_prompt_waits(monkeypatch):
    alive, entered = [], []
    step, enter = Decoder.step, Runner.enter

    def watched_step(decoder, state, *args):
        alive.append((int(state.rows.alive.sum()), len(entered)))
        return step(decoder, state, *args)

    def watched_enter(own, rows):
        entered.extend(rows)
        return enter(own, rows)

    monkeypatch.setattr(Decoder, "step", watched_step)
    monkeypatch.setattr(Runner, "enter", watched_enter)
    end = greedy(MODEL, MANY[2], 12)[3]
    generate(MODEL, None, MANY, max_new_tokens=12, batch_size=3, eos_token_id=end)
    assert len(entered) == len(MANY)
    assert all(count == 3 for count, known in alive if known < len(MANY))
    assert alive[-1][0] < 3 or alive[-1][1] == len(MANY)


LAW = {"do_sample": True, "temperature": 0.9, "top_k": 40, "top_p": 0.95}


@settings(max_examples=20)
@given(prompts_strategy, st.integers(1, 4), st.integers(1, 4), st.floats(0, 1), st.integers(0, 2**62))
def test_any_draft_gives_the_text_that_is_sampled_without(prompts, width, length, spoil, seed):
    expected = generate(MODEL, None, prompts, max_new_tokens=12, seed=seed, **LAW).new_tokens
    texts = [prompt + new for prompt, new in zip(prompts, expected, strict=True)]
    oracle = Oracle(MODEL, texts, width=width, length=length, spoil=spoil, seed=seed)
    drafted = generate(MODEL, Given(oracle), prompts, max_new_tokens=12, seed=seed, **LAW)
    assert drafted.new_tokens == expected
    if spoil == 0 and length == 4:
        assert drafted.stats.steps < 12 * len(prompts), "it was drafted"


@settings(max_examples=10)
@given(prompts_strategy, st.integers(1, 8), st.integers(1, 4), st.integers(0, 30), st.integers(0, 2**62))
def test_a_recurrent_drafter_changes_no_sampled_text(prompts, width, length, spare, seed):
    torch.manual_seed(seed)
    drafter = RecurrentDrafter.for_target(MODEL, draft_vocabulary=torch.arange(3, 40))
    sampled = {"max_new_tokens": 10, "seed": seed} | LAW
    shape = {"beam_width": width, "beam_length": length} | ({"node_budget": length + spare} if spare else {})
    drafted = generate(MODEL, drafter, prompts, **shape, **sampled)
    assert drafted.new_tokens == generate(MODEL, None, prompts, **sampled).new_tokens


def test_sampled_text_of_a_row_depends_on_its_own_seed_alone():
    prompts, seeds = [[5, 9, 12], [7], [30, 31, 32, 33, 34], [7]], [3, 4, 5, 6]
    together = generate(MODEL, None, prompts, max_new_tokens=15, seed=seeds, **LAW).new_tokens
    backwards = generate(MODEL, None, prompts[::-1], max_new_tokens=15, seed=seeds[::-1], **LAW).new_tokens
    alone = [
        generate(MODEL, None, [prompt], max_new_tokens=15, seed=[seed], **LAW).new_tokens[0]
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    assert together == backwards[::-1] == alone
    assert together[1] != together[3], "one prompt, two seeds"
    assert generate(MODEL, None, prompts, max_new_tokens=15, seed=[9, 4, 5, 6], **LAW).new_tokens[1:] == together[1:]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("drafting", [False, True])
@pytest.mark.parametrize("sampling", [False, True])
def test_logits_that_are_no_numbers_are_named_by_row_and_position(bad, drafting, sampling):
    model = tiny_model()
    prompts = [[5, 9, 12], [7]]
    plain = generate(model, None, prompts, max_new_tokens=8).new_tokens
    wrong_after = plain[1][3]
    first = plain[1].index(wrong_after)
    drafter = RecurrentDrafter.for_target(model) if drafting else None

    def spoil(module, args, output):
        """Logits after one of the tokens that row 1 writes are no numbers; it never occurs in row 0."""
        spoilt = output.clone()
        spoilt[(args[0] - marked).abs().amax(dim=-1) < 1e-4] = bad
        return spoilt

    text = torch.tensor([prompts[1] + plain[1][: first + 1]])
    marked = Target(model).hidden_states(text, torch.ones_like(text))[0, -1].detach()
    handle = model.lm_head.register_forward_hook(spoil)
    try:
        settings = {"do_sample": True, "temperature": 1e-3, "seed": 1} if sampling else {}
        with pytest.raises(RedrafterError, match=f"row 1, position {1 + first + 1} hold NaN or infinity"):
            generate(model, drafter, prompts, max_new_tokens=8, **settings)
    finally:
        handle.remove()


@pytest.mark.parametrize("part", [2, 512])
def test_the_drafter_is_given_the_states_of_the_last_positions(monkeypatch, part):
    """Of layers and positions as it asks for, wherever its row stands: after parts of a prompt, a draft, a new row."""
    read_in_parts(monkeypatch, part, part)
    model = tiny_model(num_hidden_layers=3, vocab_size=9).double()
    torch.manual_seed(0)
    drafter = RecurrentDrafter.for_target(
        model, beam_width=3, beam_length=3, context_layers=(1, 2), context_positions=3
    ).double()
    given_to_it = []

    def spy(features):
        given_to_it.append(features.clone())  # the state is written in place
        return type(drafter).context(drafter, features)

    monkeypatch.setattr(drafter, "context", spy)
    prompts = [[5], [3, 7, 4, 8], [6, 5, 4, 3, 7, 8, 3]]
    out = generate(model, drafter, prompts, max_new_tokens=12, batch_size=2)
    assert out.new_tokens == [greedy(model, prompt, 12) for prompt in prompts]
    assert 0 < out.stats.accepted < out.stats.drafted

    target = Target(model, (1, 2))
    found = torch.cat(given_to_it)
    written = [len(prompt) for prompt in prompts]
    with torch.no_grad():
        states = [target.hidden_states(text[None], torch.ones_like(text[None]))[0] for text in out.sequences]
    for row, length in enumerate(written):  # the first draft
        window = torch.cat((torch.zeros(3, 96), states[row][: length - 1]))[-3:].flatten()
        assert float((found - window).norm(dim=1).min()) < 1e-9
    for event in stream(model, drafter, prompts, max_new_tokens=12, batch_size=2):
        written[event.row] += len(event.tokens)
        if event.finish_reason is None:  # then a draft follows, from the positions before the last token
            window = torch.cat((torch.zeros(3, 96), states[event.row][: written[event.row] - 1]))[-3:].flatten()
            assert float((found - window).norm(dim=1).min()) < 1e-9
