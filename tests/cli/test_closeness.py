"""Closeness of two checkpoints from the command line: the table, the CSV, the picture, and what is refused."""

import csv

import pytest

from peft_lntune.analysis import closeness
from tests.analysis.test_plots import png_size
from tests.cases import build
from tests.cli.saved import refused, run
from tests.cli.test_change import model, tuned  # noqa: F401

pytestmark = pytest.mark.usefixtures("model")


def test_as_from_python(model, tuned, tmp_path):  # noqa: F811
    wanted = closeness(model, tuned, seed=3)
    result = run("closeness", model, tuned, "--seed", 3, "--csv", tmp_path / "c.csv", "--plot", tmp_path / "p.png")
    assert result.exit_code == 0
    assert result.stdout == f"{wanted}\n"
    with (tmp_path / "c.csv").open() as file:
        written = list(csv.reader(file))
    assert tuple(written[0]) == wanted.columns
    assert [row[4] for row in written[1:]] == [str(value) for value in wanted.column("mean_l1")]
    assert png_size(tmp_path / "p.png")[0] > 300


@pytest.mark.parametrize(
    ("options", "same"),
    [
        (["--by", "tensor"], {"by": "tensor"}),
        (["--by", "layer"], {"by": "layer"}),
        (["--no-layers"], {"layers": False}),
        (["--no-controls"], {"controls": False}),
        (["--init-std", "0.5"], {"init_std": 0.5}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options(options, same, model, tuned):  # noqa: F811
    assert run("closeness", model, tuned, *options).stdout == f"{closeness(model, tuned, **same)}\n"


def test_two_architectures(model, tmp_path):  # noqa: F811
    build("gpt2").save_pretrained(tmp_path / "gpt2")
    plot = tmp_path / "p.png"
    assert refused(run("closeness", model, tmp_path / "gpt2", "--plot", plot), "only before, such as bert.")
    assert refused(run("closeness", model, tmp_path / "gpt2", "--shared"), "share no tensor of one name and shape")
    assert not plot.exists()


def test_a_truncated_shard(model, tuned, tmp_path):  # noqa: F811
    shard = sorted(tuned.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    result = run("closeness", model, tuned, "--csv", tmp_path / "c.csv")
    assert refused(result, f"{shard.name} is damaged or cut off")
    assert not (tmp_path / "c.csv").exists()
