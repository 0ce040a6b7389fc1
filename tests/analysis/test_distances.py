"""How close models are: as plain Python counts it, controls that can be told in advance, one tensor in memory."""

import copy
import importlib
import json
import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from peft_lntune.analysis import Checkpoint, closeness, plot_closeness
from peft_lntune.analysis.distances import DISTANCES
from peft_lntune.architectures.components import find_components, group_by_place
from peft_lntune.errors import AdapterFileError, ConfigError
from tests import adapted
from tests.analysis.test_change import moved
from tests.cases import build


def oracle(old, new):
    """The three distances of two lists of numbers; None where a denominator is 0."""
    steps = [b - a for a, b in zip(old, new, strict=True)]
    total, size = math.fsum(map(abs, steps)), math.fsum(map(abs, old))
    lengths = [math.sqrt(math.fsum(x * x for x in values)) for values in (old, new)]
    angle = None
    if all(lengths):
        cosine = math.fsum(a * b for a, b in zip(old, new, strict=True)) / (lengths[0] * lengths[1])
        angle = math.acos(max(-1.0, min(1.0, cosine))) / math.pi
    return total / len(steps), total / size if size else None, angle


def flat(tensors, names):
    return [value for name in names for value in tensors[name].double().flatten().tolist()]


def same(found, wanted, rel=1e-9, floor=1e-9):
    for value, right in zip(found, wanted, strict=True):
        assert value == right if right is None else value == pytest.approx(right, rel=rel, abs=floor)


@pytest.mark.parametrize("layers", [True, False])
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_components_against_plain_python(family, layers):
    before, after = adapted.build(family), moved(adapted.build(family))
    old, new = dict(before.named_parameters()), dict(after.named_parameters())
    table = closeness(before, after, layers=layers, controls=False)
    assert list(table.columns)[-4:] == ["entries", *DISTANCES]
    groups = group_by_place(find_components(old), layers=layers)
    assert len(groups) == len(table.rows)
    for row, (place, names) in zip(table.rows, groups.items(), strict=True):
        assert row[:-4] == (tuple(place) if layers else (place.component, place.parameter))
        assert row[-4] == sum(old[name].numel() for name in names)
        same(row[-3:], oracle(flat(old, names), flat(new, names)), floor=1e-7)


def test_tensors_and_layers_against_plain_python():
    before, after = adapted.build("bert"), moved(adapted.build("bert"))
    old, new = dict(before.named_parameters()), dict(after.named_parameters())
    places = find_components(old)
    tensors = closeness(before, after, by="tensor", controls=False)
    assert tensors.columns == ("tensor", "component", "layer", "parameter", "entries", *DISTANCES)
    for row, name in zip(tensors.rows, old, strict=True):
        assert row[:4] == (name, *places[name])
        same(row[5:], oracle(flat(old, [name]), flat(new, [name])), floor=1e-7)
    layers = closeness(before, after, by="layer", controls=False)
    assert layers.column("layer") == [None, 0, 1]
    for row in layers.rows:
        names = [name for name, place in places.items() if place.layer == row[0]]
        same(row[2:], oracle(flat(old, names), flat(new, names)), floor=1e-7)


values = st.floats(-100, 100, width=32)


@given(st.lists(st.tuples(values, values), min_size=1, max_size=8))
@settings(max_examples=80, deadline=None)
def test_any_values(pairs):
    old, new = ([pair[side] for pair in pairs] for side in (0, 1))
    row = closeness({"w": torch.tensor(old)}, {"w": torch.tensor(new)}, controls=False).rows[0]
    old, new = (torch.tensor(side).double().tolist() for side in (old, new))
    wanted = oracle(old, new)
    # arccos, the oracle's, is right to the root of the rounding only; squares of the smallest numbers are 0.
    tiny = any(0 < abs(x) < 1e-150 for x in (*old, *new))
    same(row[-3:-1], wanted[:2])
    if not tiny:
        same(row[-1:], wanted[2:], floor=1e-7)


@pytest.mark.parametrize("step", [1e-12, 1e-9, 1e-6, 1e-3])
def test_small_angles_keep_their_digits(step):
    old = torch.tensor([1.0, 0.0], dtype=torch.float64)
    table = closeness({"w": old}, {"w": old + torch.tensor([0.0, step], dtype=torch.float64)}, controls=False)
    assert table.column("angle")[0] == pytest.approx(math.atan(step) / math.pi, rel=1e-9)


@pytest.mark.parametrize("scale", [0.7, 1.1, 1.5])
def test_a_step_along_itself_is_no_angle(scale):
    old = torch.rand(100, dtype=torch.float64)
    assert closeness({"w": old}, {"w": scale * old}, controls=False).column("angle") == [0.0]


def test_lengths_far_apart():
    old, new = (torch.tensor(entries, dtype=torch.float64) for entries in ([1.0, 0.0], [1e-10, 1e-12]))
    found = closeness({"w": old}, {"w": new}, controls=False).column("angle")
    assert found == [pytest.approx(math.atan(0.01) / math.pi, rel=1e-9)]


@pytest.mark.parametrize(
    ("old", "new", "angle"),
    [
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], 0.0),
        ([0.1, 0.2, 0.7], [0.3, 0.6, 2.1], 0.0),  # along itself: no angle, whatever is rounded
        ([1.0, 2.0], [-2.0, -4.0], 1.0),
        ([1.0, 0.0], [0.0, 5.0], 0.5),
        ([0.0, 1.0], [1e-30, 0.0], 0.5),
        ([0.0, 1.0], [1e-20, 1e-20], 0.25),
        ([0.0, 0.0], [1.0, 0.0], None),
        ([1.0, 0.0], [0.0, 0.0], None),
    ],
)
def test_angles(old, new, angle):
    found = closeness({"w": torch.tensor(old)}, {"w": torch.tensor(new)}, controls=False).column("angle")
    assert found == [angle if angle is None else pytest.approx(angle, abs=1e-7)]


def test_pieces(monkeypatch):
    before, after = adapted.build("bert"), moved(adapted.build("bert"))
    whole = closeness(before, after, controls=False)
    monkeypatch.setattr(importlib.import_module("peft_lntune.analysis.pooling"), "CHUNK", 7)
    for row, right in zip(closeness(before, after, controls=False).rows, whole.rows, strict=True):
        assert row[:-3] == right[:-3]
        same(row[-3:], right[-3:], rel=1e-7)


def test_half_precision_is_summed_in_float64():
    old = torch.ones(4097, dtype=torch.bfloat16)
    assert closeness({"w": old}, {"w": old + 1}, controls=False).column("mean_l1") == [1.0]


# Controls.

N = 40_000


def controls(**options):
    torch.manual_seed(0)
    old = {"wte.weight": torch.randn(4, N // 4), "ln_f.weight": torch.ones(N) + 0.1 * torch.randn(N)}
    new = {name: value + 0.01 * torch.rand(value.shape) for name, value in old.items()}
    return closeness(old, new, **options)


def test_noise_is_as_long_as_the_step():
    table = controls(by="tensor")
    old, step = 1.0, 0.01 / math.sqrt(3)  # root mean squares of normal entries, and of uniform steps
    mean, relative, angle = (table.column(f"noise_{name}")[0] for name in DISTANCES)
    assert mean == pytest.approx(step * math.sqrt(2 / math.pi), rel=0.02)
    assert relative == pytest.approx(mean / math.sqrt(2 / math.pi), rel=0.02)
    assert angle == pytest.approx(math.atan(step / old) / math.pi, rel=0.02)
    # The real step goes one way: of equal length it has the larger L1 norm than noise, and on ones no angle.
    assert table.column("mean_l1")[0] > mean
    assert table.column("noise_angle")[1] > 1.5 * table.column("angle")[1]


def test_noise_against_plain_python():
    """Drawn once more, scaled in every entry, and measured as any other two tensors."""
    from peft_lntune.selection.parameters import generator

    torch.manual_seed(0)
    old, new = torch.randn(3, 5), torch.randn(3, 5)
    row = closeness({"w": old}, {"w": new}, seed=3)
    noise = torch.randn(15, generator=generator(3, "noise w")).double()
    noise *= (new.double() - old.double()).norm() / noise.norm()
    reached = (old.double().flatten() + noise).tolist()
    same(row.rows[0][-3:], oracle(old.double().flatten().tolist(), reached), floor=1e-7)


def test_random_starts_have_nothing_in_common():
    table = controls(by="tensor", init_std=0.05)
    mean, relative, angle = (table.column(f"random_{name}")[0] for name in DISTANCES)
    assert mean == pytest.approx(0.05 * 2 / math.sqrt(math.pi), rel=0.02)
    assert relative == pytest.approx(math.sqrt(2), rel=0.02)
    assert angle == pytest.approx(0.5, abs=0.01)
    assert [table.column(f"random_{name}")[1] for name in DISTANCES] == [0, 0, 0]  # all gains start at 1


def test_biases_start_at_zero():
    table = closeness({"a.bias": torch.ones(2)}, {"a.bias": torch.zeros(2)})
    assert [table.column(f"random_{name}")[0] for name in DISTANCES] == [0, None, None]


def test_models_as_random_starts():
    before, after = adapted.build("bert"), moved(adapted.build("bert"))
    starts = build("bert", seed=5), build("bert", seed=6)
    table = closeness(before, after, initial=starts)
    wanted = closeness(*starts, controls=False)
    for name in DISTANCES:
        assert table.column(f"random_{name}") == wanted.column(name)
    with pytest.raises(ConfigError, match=r"initial should hold two models .* has no bert"):
        closeness(before, after, initial=({"w": torch.ones(1)}, {"w": torch.zeros(1)}))


def test_seeds():
    one, same_again, other = controls(), controls(), controls(seed=1)
    assert one == same_again
    assert one.column("angle") == other.column("angle")
    assert one.column("noise_angle") != other.column("noise_angle")
    assert one.column("random_mean_l1")[0] != other.column("random_mean_l1")[0]


def test_controls_hang_on_no_order():
    tensors = {"a.weight": torch.randn(3, 3), "b.weight": torch.randn(3, 3)}
    after = {name: value + 1 for name, value in tensors.items()}
    forth = closeness(tensors, after, by="tensor")
    back = closeness(dict(reversed(tensors.items())), after, by="tensor")
    assert sorted(forth.rows) == sorted(back.rows)
    assert forth.rows[0][5:8] != forth.rows[1][5:8]
    assert forth.rows[0][8:11] != forth.rows[1][8:11]


def test_equal_models_have_no_noise():
    table = closeness(build("bert"), build("bert"))
    for name in DISTANCES:
        assert set(table.column(f"noise_{name}")) <= {0.0, None}
        assert table.column(f"noise_{name}") == table.column(name)


# Checkpoints.


@pytest.fixture
def saved(tmp_path):
    before, after = adapted.build("bert"), moved(adapted.build("bert"))
    before.save_pretrained(tmp_path / "before")
    after.save_pretrained(tmp_path / "after", max_shard_size="5KB")
    return before, after, tmp_path / "before", tmp_path / "after"


def test_files_and_models_give_the_same(saved):
    before, after, *paths = saved
    assert (paths[1] / "model.safetensors.index.json").is_file()
    wanted, found = closeness(before, after), closeness(*paths)
    assert sorted(found.rows, key=str) == sorted(wanted.rows, key=str)
    assert closeness(before, paths[1]).rows == wanted.rows


def test_one_tensor_of_each_side_is_in_memory(saved, monkeypatch):
    alive, most = weakref.WeakSet(), []
    read = Checkpoint.__getitem__

    def counted(self, name):
        tensor = read(self, name)
        alive.add(tensor)
        most.append(len(alive))
        return tensor

    monkeypatch.setattr(Checkpoint, "__getitem__", counted)
    monkeypatch.setattr(torch.Tensor, "__hash__", lambda self: id(self))
    closeness(*saved[2:])
    assert len(most) > 50
    assert max(most) == 2


def test_a_bar(saved, capsys, monkeypatch):
    import tqdm.auto

    bars = []
    whole = tqdm.auto.tqdm
    monkeypatch.setattr(
        "tqdm.auto.tqdm", lambda *args, **kwargs: bars.append((whole(*args, **kwargs), kwargs)) or bars[-1][0]
    )
    closeness(*saved[2:])
    closeness(*saved[2:], progress=False)
    (shown, options), (_, hidden) = bars
    assert (options["disable"], hidden["disable"]) == (False, True)
    assert shown.n == shown.total == len(Checkpoint(saved[2]))
    assert capsys.readouterr().err == ""  # nothing of it before it has taken seconds


def test_a_truncated_shard_is_found_before_anything_is_read(saved, monkeypatch):
    shard = sorted(saved[3].glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-8])
    monkeypatch.setattr(Checkpoint, "__getitem__", lambda self, name: pytest.fail("a tensor was read"))
    with pytest.raises(AdapterFileError, match=f"{shard.name} is damaged or cut off"):
        closeness(*saved[2:])


def test_two_architectures(saved, tmp_path):
    build("gpt2").save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ConfigError, match=r"only before, such as bert.* only after, such as transformer"):
        closeness(saved[2], tmp_path / "gpt2")


def test_a_body_and_a_model_with_a_head(tmp_path):
    before, after = adapted.build("bert"), moved(adapted.build("bert"))
    before.bert.save_pretrained(tmp_path)  # without the prefix `bert.`
    with pytest.raises(ConfigError, match="only before, such as embeddings"):
        closeness(tmp_path, after)
    table = closeness(tmp_path, after, shared=True, controls=False)
    wanted = closeness(before.bert, after.bert, controls=False)
    assert sorted(table.rows, key=str) == sorted(wanted.rows, key=str)


# What is refused.


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"by": "module"}, "by='module': choose one of 'component', 'layer', 'tensor'"),
        ({"by": "tensor", "layers": False}, "layers=False pools the layers of components"),
    ],
)
def test_options(options, said):
    with pytest.raises(ConfigError, match=said):
        closeness({"w": torch.ones(1)}, {"w": torch.ones(1)}, **options)


@pytest.mark.parametrize("when", ["before", "after"])
def test_not_finite(when):
    sides = {"before": torch.ones(2), "after": torch.ones(2)}
    sides[when] = torch.tensor([1.0, math.nan])
    with pytest.raises(ConfigError, match=f"w has NaN or infinite entries {when}"):
        closeness(*({"w": value} for value in sides.values()))


def test_changed_shapes(tmp_path):
    save_file({"w": torch.ones(2, 3)}, tmp_path / "a.safetensors")
    save_file({"w": torch.ones(3, 2)}, tmp_path / "b.safetensors")
    with pytest.raises(ConfigError, match=r"w is \(2, 3\) before and \(3, 2\) after"):
        closeness(tmp_path / "a.safetensors", tmp_path / "b.safetensors")


def test_nothing_changes():
    model = build("bert")
    old = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    closeness(model, adapted.adapt(copy.deepcopy(model)))
    assert all(torch.equal(value, old[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


# The picture and the CSV.


def test_csv_has_every_digit(tmp_path):
    table = controls()
    table.to_csv(tmp_path / "c.csv")
    header, first = (line.split(",") for line in (tmp_path / "c.csv").read_text().splitlines()[:2])
    assert header == list(table.columns)
    assert [float(cell) for cell in first[3:]] == list(table.rows[0][3:])


@pytest.fixture
def drawn(monkeypatch):
    figure = pytest.importorskip("matplotlib.figure").Figure
    figures, keep = [], figure.__init__

    def init(self, *args, **kwargs):
        keep(self, *args, **kwargs)
        figures.append(self)

    monkeypatch.setattr(figure, "__init__", init)
    return figures


@pytest.mark.end_to_end
@pytest.mark.parametrize("layers", [True, False])
@pytest.mark.parametrize("with_controls", [True, False])
def test_picture_shows_the_table(layers, with_controls, tmp_path, drawn):
    table = closeness(build("bert"), moved(build("bert")), layers=layers, controls=with_controls)
    plot_closeness(table, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 5000
    *panels, bar = drawn[0].axes
    columns = {
        "Before and after": "angle",
        "Noise as long as the step": "noise_angle",
        "Two random starts": "random_angle",
    }
    assert [panel.get_title().replace("\n", " ") for panel in panels] == list(columns)[: 3 if with_controls else 1]
    assert bar.get_ylabel().startswith("angle / pi")
    rows = [label.get_text() for label in panels[0].get_yticklabels()]
    heads = [None, 0, 1] if layers else [None]
    layer = table.column("layer") if layers else [None] * len(table.rows)
    for panel in panels:
        shown = panel.get_images()[0].get_array()
        found = {
            (f"{component}, {parameter}", number): value
            for component, parameter, number, value in zip(
                table.column("component"), table.column("parameter"), layer,
                table.column(columns[panel.get_title().replace("\n", " ")]), strict=True,
            )
        }  # fmt: skip
        for y, row in enumerate(rows):
            for x, head in enumerate(heads):
                value = found.get((row, head))
                assert shown.mask[y, x] if value is None else shown[y, x] == value or value == 0


def test_every_measure_can_be_drawn(tmp_path, drawn):
    table = controls()
    for measure in DISTANCES:
        plot_closeness(table, tmp_path / "p.png", measure)
    assert len({figure.get_suptitle() for figure in drawn}) == 3


@pytest.mark.parametrize(
    ("options", "measure", "said"),
    [
        ({}, "l2", "measure='l2': choose one of mean_l1, relative_l1, angle"),
        ({"by": "layer"}, "angle", 'by="component"'),
        ({"by": "tensor"}, "angle", 'by="component"'),
    ],
)
def test_pictures_that_are_refused(options, measure, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        plot_closeness(controls(**options), tmp_path / "p.png", measure)
    assert list(tmp_path.iterdir()) == []


def test_an_index_and_a_file_agree(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "x.safetensors")
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "x.safetensors"}}))
    table = closeness(tmp_path / "x.safetensors", tmp_path / "m.safetensors.index.json")
    assert table.column("mean_l1") == [0.0]
