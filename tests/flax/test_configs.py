"""A config is data: it round-trips, makes only objects that it may name, and runs nothing else."""

import importlib
import json
import sys
import textwrap
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flax_dropout_cell as fdc
from flax_dropout_cell._flax.tensorflow.trusted_names import KNOWN_FUNCTIONS

WRAPPERS = {"linen": fdc.linen.RNNCellDropoutWrapper, "nnx": fdc.nnx.RNNCellDropoutWrapper}
RNGS = {"linen": {}, "nnx": {"rngs": nnx.Rngs(0)}}
STOCK = {
    "linen": {"class_name": "flax.linen:GRUCell", "config": {"features": 3}},
    "nnx": {
        "class_name": "flax.nnx:GRUCell",
        "config": {"in_features": 2, "hidden_features": 3},
    },
}
# Effects of running foreign code: Python reports each of these to audit hooks.
LOUD = ("import", "exec", "compile", "open", "os.", "subprocess.", "socket.", "pickle.", "ctypes.")
heard: list[str] | None = None


def listen(event: str, _: Any) -> None:
    if heard is not None and event.startswith(LOUD):
        heard.append(event)


sys.addaudithook(listen)


def read(host: str, config: Any, trusted: Any = ()) -> Any:
    return WRAPPERS[host].from_config(config, trusted=trusted, **RNGS[host])


def cell(class_name: Any, **config: Any) -> Any:
    return lambda stock: {"cell": {"class_name": class_name, "config": config}}


def gate(name: Any) -> Any:
    return argument(gate_fn={"import_path": name})


def argument(**arguments: Any) -> Any:
    return lambda stock: {"cell": {**stock, "config": stock["config"] | arguments}}


def visitor(name: Any) -> Any:
    return wrapper(dropout_state_filter_visitor={"import_path": name})


def wrapper(**arguments: Any) -> Any:
    return lambda stock: {"cell": stock, **arguments}


def instead(config: Any) -> Any:
    return lambda stock: config


def nested(depth: int) -> Any:
    def config(stock: Any) -> Any:
        name = stock["class_name"].replace("flax.", "flax_dropout_cell.").split(":")[0]
        for _ in range(depth):
            stock = {"class_name": f"{name}:RNNCellDropoutWrapper", "config": {"cell": stock}}
        return {"cell": stock}

    return config


def in_itself(stock: Any) -> Any:
    config = {"cell": stock}
    config["more"] = config
    return config


def around(name: str) -> Any:
    """An attack inside a config that a trusted cell would read."""
    return cell("my_project.cells:LinenHolder", inner={"class_name": name, "config": {}})


# Configs of an attacker who knows the code, and the errors.
UNTRUSTED = "which was not run"
ATTACKS = {
    "a program": (cell("subprocess:Popen", args=["true"]), UNTRUSTED),
    "a shell": (visitor("os:system"), UNTRUSTED),
    "posix": (gate("posix:system"), UNTRUSTED),
    "eval": (gate("builtins:eval"), UNTRUSTED),
    "the importer": (gate("importlib:import_module"), UNTRUSTED),
    "a planted module": (cell("planted:Cell"), UNTRUSTED),
    "a planted visitor": (visitor("planted:visit"), UNTRUSTED),
    "a prefix of a name": (cell("flaxevil:Cell"), UNTRUSTED),
    "a prefix of a trusted one": (cell("my_project_evil:Cell"), UNTRUSTED),
    "a module within flax": (cell("flax.planted:Cell"), UNTRUSTED),
    "through a module": (gate("jax.numpy:np.load"), "must be a name such as"),
    "through a module of flax": (cell("flax.linen:os.system"), "must be a name such as"),
    "a module's module": (gate("jax.nn:jnp"), UNTRUSTED),
    "a reader of files": (gate("jax.numpy:load"), UNTRUSTED),
    "a writer of files": (gate("jax.numpy:save"), UNTRUSTED),
    "a callback": (gate("jax:pure_callback"), UNTRUSTED),
    "an io callback": (gate("jax.experimental:io_callback"), UNTRUSTED),
    "a debug callback": (gate("jax.debug:callback"), UNTRUSTED),
    "a server": (gate("jax.profiler:start_server"), UNTRUSTED),
    "a trace to disk": (
        argument(kernel_init={"import_path": "jax.profiler:start_trace"}),
        UNTRUSTED,
    ),
    "a checkpoint": (visitor("flax.training.checkpoints:restore_checkpoint"), UNTRUSTED),
    "a partial": (gate("jax.tree_util:Partial"), UNTRUSTED),
    "a private part of jax": (gate("jax._src.config:update"), UNTRUSTED),
    "a module that is no cell": (cell("flax.linen:Dense", features=3), UNTRUSTED),
    "the abstract cell": (cell("flax.linen:RNNCellBase"), UNTRUSTED),
    "a class method": (cell("flax.linen:GRUCell.clone"), "must be a name such as"),
    "a method of a trusted class": (
        gate("my_project.cells:LinenCell.shout"),
        "must be a name such as",
    ),
    "a dunder": (gate("my_project.cells:__builtins__"), "must be a name"),
    "a dunder below": (cell("my_project.cells:LinenCell.__init__"), "must be a name"),
    "what it has imported": (gate("my_project.cells:run"), "no function or class of that name"),
    "a module that it has imported": (gate("my_project.cells:os"), "no function or class"),
    "through what it has imported": (gate("my_project.cells:os.system"), "must be a name such as"),
    "a trusted class that is no cell": (cell("my_project.cells:Loud"), "is not a RNNCellBase"),
    "such a class as a function": (gate("my_project.cells:Loud"), "is not a RNNCellBase"),
    "a function as a cell": (cell("my_project.cells:visit"), "which is not a cell's class"),
    "a trusted name that is none": (gate("my_project.cells:gone"), "no function or class"),
    "a trusted module that is none": (gate("my_project.gone:visit"), "cannot be imported"),
    "an activation as a cell": (cell("jax.nn:relu"), "which is not a cell's class"),
    "an activation as a visitor": (visitor("jax.nn:relu"), "which is not a state filter visitor"),
    "an attack within": (around("subprocess:Popen"), UNTRUSTED),
    "no name": (cell("subprocess"), "must be a name such as"),
    "no module": (cell(":Popen"), "must be a name such as"),
    "a relative module": (cell(".cells:Cell"), "must be a name such as"),
    "two names": (cell("flax.linen:GRUCell:os"), "must be a name such as"),
    "a line break": (cell("flax.linen:GRUCell\nos"), "must be a name such as"),
    "letters that look alike": (cell("ﬂax.linen:GRUCell"), "must be a name such as"),
    "a number as a name": (cell(3), "must be a name such as 'flax.linen:LSTMCell', got 3"),
    "a long name": (cell("flax" * 10_000 + ":a"), "must be a name such as"),
    "a dtype with fields": (argument(param_dtype={"dtype": "i4,O"}), "must name a dtype"),
    "a dtype of objects": (argument(dtype={"dtype": "object"}), "must name a dtype"),
    "a list of dtypes": (argument(dtype={"dtype": ["f4"]}), "must name a dtype of jax.numpy"),
    "an object": (argument(features=object()), "a config holds what JSON can"),
    "a key that is no string": (instead({3: 4}), "has the key 3; keys are strings"),
    "a dict of nothing known": (argument(gate_fn={"a": 1}), "is a dict that describes neither"),
    "no dict": (instead([1, 2]), r"config must be a dict that get_config gave, got \[1, 2\]"),
    "nothing": (instead(None), "config must be a dict that get_config gave, got None"),
    "no cell": (instead({"input_keep_prob": 0.5}), "config needs 'cell'"),
    "a cell of a wrong type": (instead({"cell": "flax.linen:GRUCell"}), "must have a class_name"),
    "a cell without config": (instead({"cell": {"class_name": "flax.linen:GRUCell"}}), "must have"),
    "a config of a wrong type": (
        lambda stock: {"cell": {**stock, "config": [1]}},
        r"config.cell.config must be a dict of arguments, got \[1\]",
    ),
    "a key too many": (wrapper(callback="os:system"), "config takes no 'callback'; its arguments"),
    "a key too many in the cell": (argument(parent=None), "config.cell.config takes no 'parent'"),
    "a key too few in the cell": (
        lambda stock: {"cell": {**stock, "config": {}}},
        "config needs '",
    ),
    "a keep_prob of a wrong type": (
        wrapper(input_keep_prob="0.5"),
        "input_keep_prob must be a num",
    ),
    "a keep_prob that is NaN": (wrapper(state_keep_prob=float("nan")), "must be between 0 and 1"),
    "a seed of a wrong type": (wrapper(seed=[1]), r"seed must be an int or None, got \[1\]"),
    "a flag of a wrong type": (wrapper(deterministic="no"), "deterministic must be true or false"),
    "sizes of a wrong type": (wrapper(input_size=[True]), "input_size must be ints or None"),
    "dims of a wrong type": (wrapper(broadcast_dims=0), "broadcast_dims must be a list of ints"),
    "a wrapper's dtype": (wrapper(dtype="V100000"), "dtype must be a dtype's name or None"),
    "a visitor of a wrong type": (
        wrapper(dropout_state_filter_visitor="os:system"),
        "dropout_state_filter_visitor must be {'import_path': a name} or None",
    ),
    "a deep config": (nested(10_000), "nested more than 64 deep"),
    "a deep list": (argument(features=json.loads("[" * 900 + "]" * 900)), "nested more than 64"),
    "a huge list": (argument(features=[0] * 10**6), "more than 10000 entries"),
    "many lists": (argument(features=[[0] * 101] * 101), "more than 10000 entries"),
    "a config in itself": (in_itself, "nested more than 64 deep"),
    "a shout": (argument(**{"a\nb\nc\nd\ne\nf" * 99: object()}), "a config holds what JSON can"),
}

PROJECT = """
import os
from subprocess import run

import flax.linen as nn
import jax
from flax import nnx


def visit(state):
    return True


def half(x):
    return 0.5 * x


@jax.jit
def quarter(x):
    return 0.25 * x


class Loud:
    def __init__(self, *args, **kwargs):
        open({marker!r}, "w").close()


class LinenCell(nn.SimpleCell):
    scale: float = 1.0

    @classmethod
    def shout(cls, *args):
        open({marker!r}, "w").close()


class LinenHolder(nn.RNNCellBase):
    inner: nn.RNNCellBase
    others: tuple = ()
    gate: object = None
    name_of: str = ""

    def __call__(self, carry, inputs):
        return self.inner(carry, inputs)


class NnxCell(nnx.SimpleCell):
    pass


class NnxHolder(nnx.RNNCellBase):
    def __init__(self, inner, others=(), gate=None, name=""):
        self.inner, self.gate, self.name = inner, gate, name
        self.others = others

    def __call__(self, carry, inputs):
        return self.inner(carry, inputs)


class Written(nn.RNNCellBase):
    inner: nn.RNNCellBase

    def __call__(self, carry, inputs):
        return self.inner(carry, inputs)

    def get_config(self):
        return {{"inside": self.inner.get_config()}}

    @classmethod
    def from_config(cls, config, trusted):
        import flax_dropout_cell as fdc

        wrapper = fdc.linen.RNNCellDropoutWrapper
        return cls(wrapper.from_config(config["inside"], trusted=trusted))
"""
PLANTED = "open({marker!r}, 'w').close()\nclass Cell: pass\ndef visit(state): return True\n"


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """A folder on sys.path with a user's project and an attacker's modules; they leave a mark."""
    mark = tmp_path / "was_run"
    (tmp_path / "my_project").mkdir()
    (tmp_path / "my_project" / "__init__.py").write_text("")
    (tmp_path / "my_project" / "cells.py").write_text(
        textwrap.dedent(PROJECT.format(marker=str(mark)))
    )
    for name in ("planted", "flaxevil", "my_project_evil"):
        (tmp_path / f"{name}.py").write_text(PLANTED.format(marker=str(mark)))
    monkeypatch.syspath_prepend(tmp_path)
    yield mark
    for name in [name for name in sys.modules if name.split(".")[0] == "my_project"]:
        del sys.modules[name]


@pytest.mark.parametrize("host", WRAPPERS)
@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_runs_nothing(name, host, marker) -> None:
    global heard
    make, text = ATTACKS[name]
    config = make(STOCK[host])
    importlib.import_module("my_project.cells")  # importing a trusted module is allowed
    before = set(sys.modules)
    heard = []
    try:
        with pytest.raises((ValueError, TypeError), match=text) as error:
            read(host, config, trusted=("my_project",))
    finally:
        events, heard = heard, None
    assert len(str(error.value)) < 500
    assert "\n" not in str(error.value)
    if name == "a trusted module that is none":
        assert "exec" not in events  # it was looked for, as trusted modules are
    else:
        assert events == []
    assert set(sys.modules) == before
    assert not marker.exists()


def test_a_name_is_checked_before_anything_trusted_is_imported(marker) -> None:
    """A refused name anywhere in a config: not even its trusted part is imported or made."""
    config = {
        "cell": {"class_name": "my_project.cells:LinenHolder", "config": {"inner": STOCK["linen"]}},
        "dropout_state_filter_visitor": {"import_path": "os:system"},
    }
    with pytest.raises(ValueError, match=UNTRUSTED):
        read("linen", config, trusted=("my_project",))
    assert "my_project" not in sys.modules


def test_arguments_are_checked_before_any_cell_is_made(marker) -> None:
    """Here the second cell is wrong: the first, which would be made before it, is not."""
    cells = importlib.import_module("my_project.cells")
    made = []
    cells.LinenCell.__post_init__ = lambda self: made.append(self)
    inner = {"class_name": "my_project.cells:LinenCell", "config": {"features": 1}}
    wrong = {"class_name": "my_project.cells:LinenCell", "config": {"units": 1}}
    holder = {"inner": inner, "others": [wrong]}
    config = {"cell": {"class_name": "my_project.cells:LinenHolder", "config": holder}}
    with pytest.raises(ValueError, match=r"others\[0\].config takes no 'units'; its arguments are"):
        read("linen", config, trusted=("my_project",))
    assert made == []


def test_what_cannot_be_made_says_why() -> None:
    config = {"cell": {**STOCK["nnx"], "config": {"in_features": 2, "hidden_features": "3"}}}
    with pytest.raises(ValueError, match=r"config\.cell\.config makes no GRUCell: ") as error:
        read("nnx", config)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("trusted", ["my_project", 3, [3], ("",), ("my project",), ("os:",)])
@pytest.mark.parametrize("host", WRAPPERS)
def test_trusted_is_a_sequence_of_modules(host, trusted) -> None:
    with pytest.raises(TypeError, match=r"^trusted must (be a sequence of|hold) modules' names"):
        read(host, {"cell": STOCK[host]}, trusted)


def test_trust_is_for_the_modules_that_were_named(marker) -> None:
    wrapper = fdc.linen.RNNCellDropoutWrapper(
        importlib.import_module("my_project.cells").LinenCell(3)
    )
    config = wrapper.get_config()
    for trusted in ((), ("my",), ("my_project.cell",), ("my_project.cells.more",), ("cells",)):
        with pytest.raises(ValueError, match=UNTRUSTED):
            read("linen", config, trusted)
    for trusted in (("my_project",), ("my_project.cells",), ["other", "my_project"]):
        assert type(read("linen", config, trusted).cell) is type(wrapper.cell)


LINEN_CELLS = {
    "LSTM": lambda my: nn.LSTMCell(10),
    "optimized LSTM": lambda my: nn.OptimizedLSTMCell(10, dtype=jnp.float16),
    "GRU": lambda my: nn.GRUCell(10, gate_fn=nn.tanh, param_dtype=jnp.bfloat16),
    "MGU": lambda my: nn.MGUCell(3, activation_fn=jax.nn.relu, reset_gate=False),
    "simple": lambda my: nn.SimpleCell(3, residual=True, bias_init=nn.initializers.ones),
    "convolutional": lambda my: nn.ConvLSTMCell(4, kernel_size=(3, 3), use_bias=False),
    "NumPy's numbers": lambda my: nn.GRUCell(np.int64(3)),  # type: ignore
    "nested": lambda my: fdc.linen.RNNCellDropoutWrapper(
        fdc.linen.RNNCellDropoutWrapper(nn.MGUCell(3), 0.5), seed=np.int64(3)
    ),
    "the user's": lambda my: my.LinenCell(
        np.int32(3), scale=np.float32(0.5), activation_fn=my.half
    ),
    "its functions": lambda my: my.LinenCell(3, activation_fn=my.quarter),
    "one that holds cells": lambda my: my.LinenHolder(
        my.LinenHolder(nn.LSTMCell(2), others=(my.LinenCell(3), nn.GRUCell(4)), gate=my.half),
        gate=nn.LSTMCell,
        name_of="os:system",
    ),
    "one with a config of its own": lambda my: my.Written(
        fdc.linen.RNNCellDropoutWrapper(my.LinenCell(3), dropout_state_filter_visitor=my.visit)
    ),
}
NNX_CELLS = {
    "LSTM": lambda my: nnx.LSTMCell(3, 8, gate_fn=jax.nn.relu6, rngs=nnx.Rngs(0)),
    "optimized LSTM": lambda my: nnx.OptimizedLSTMCell(3, 8, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)),
    "GRU": lambda my: nnx.GRUCell(np.int32(3), 8, activation_fn=jnp.sin, rngs=nnx.Rngs(0)),  # type: ignore
    "simple": lambda my: nnx.SimpleCell(3, 8, residual=True, rngs=nnx.Rngs(0)),
    "nested": lambda my: fdc.nnx.RNNCellDropoutWrapper(
        fdc.nnx.RNNCellDropoutWrapper(nnx.GRUCell(3, 8, rngs=nnx.Rngs(0)), 0.5)
    ),
    "the user's": lambda my: my.NnxCell(3, 8, activation_fn=my.half, rngs=nnx.Rngs(0)),
    "one that holds cells": lambda my: my.NnxHolder(
        my.NnxHolder(nnx.GRUCell(3, 8, rngs=nnx.Rngs(0)), gate=my.quarter), name="mine"
    ),
}
CELLS = [
    *(("linen", name, make) for name, make in LINEN_CELLS.items()),
    *(("nnx", name, make) for name, make in NNX_CELLS.items()),
]


@pytest.mark.parametrize(
    ("host", "name", "make"), CELLS, ids=lambda part: "" if callable(part) else part
)
def test_a_config_comes_back_as_it_was(host, name, make, marker) -> None:
    my = importlib.import_module("my_project.cells")
    arguments: dict[str, Any] = {
        "input_keep_prob": np.float32(0.5),
        "state_keep_prob": jnp.float32(0.25),
        "variational_recurrent": True,
        "input_size": np.int64(3),
        "dtype": jnp.bfloat16,
        "seed": np.uint64(2**62),
        "dropout_state_filter_visitor": my.visit,
        "broadcast_dims": (np.int32(0),),
    }
    for given in ({}, arguments):
        wrapper: Any = WRAPPERS[host](make(my), **given)
        config = wrapper.get_config()
        again = read(host, json.loads(json.dumps(config)), trusted=("my_project",))
        assert again.get_config() == config
        assert type(again.cell) is type(wrapper.cell)
        assert again.dropout_state_filter_visitor is wrapper.dropout_state_filter_visitor
        assert again.seed == wrapper.seed
    # A new program reads it and imports the trusted module there.
    for module in ("my_project.cells", "my_project"):
        del sys.modules[module]
    assert read(host, config, trusted=("my_project",)).get_config() == config


def test_a_list_comes_back_as_a_tuple(marker) -> None:
    my = importlib.import_module("my_project.cells")
    holder = my.NnxHolder(nnx.GRUCell(3, 8, rngs=nnx.Rngs(0)), others=(1, (2, 3)))
    config = json.loads(json.dumps(fdc.nnx.RNNCellDropoutWrapper(holder).get_config()))
    again = read("nnx", config, trusted=("my_project",))
    assert again.wrapped_cell.others == (1, (2, 3))


def test_what_a_config_cannot_hold(marker) -> None:
    my = importlib.import_module("my_project.cells")
    for bad, text in (
        (
            my.LinenHolder(nn.GRUCell(3), gate=lambda x: x),
            "has no import path, and a config holds no",
        ),
        (my.LinenHolder(nn.GRUCell(3), gate=my.LinenCell.shout), "has no import path"),
        (my.LinenHolder(nn.GRUCell(3), gate=jnp.ones(3)), r"gate is float32\[3\], which a config"),
        (
            my.LinenHolder(nn.GRUCell(3), gate={"a": 1}),
            "gate is a .*[dD]ict, which a config cannot",
        ),
        (my.LinenHolder(nn.GRUCell(3), gate=nn.Dense(3)), "gate is .*Dense"),
        (my.LinenCell(3, activation_fn=nn.initializers.normal()), "activation_fn is the function"),
        (fdc.linen.DropoutCell(nn.GRUCell(3), fdc.RecurrentDropout()), "a RecurrentDropout, which"),
    ):
        with pytest.raises(ValueError, match=text) as error:
            fdc.linen.RNNCellDropoutWrapper(bad).get_config()
        assert len(str(error.value)) < 300


def test_known_functions_are_plain_functions_of_arrays() -> None:
    """Each gives an array, of the shape that it was asked for or of its argument."""
    for name, function in KNOWN_FUNCTIONS.items():
        if "initializers" in name:
            y = function(jax.random.key(0), (3, 4), jnp.float32)
        else:
            y = jax.eval_shape(function, jnp.full((3, 4), 0.5))
        assert y.shape == ((3, 2) if name == "jax.nn:glu" else (3, 4)), name
        module, _, attribute = name.partition(":")
        assert getattr(sys.modules[module], attribute) is function


@pytest.mark.parametrize("host", ["linen", "nnx"])
@pytest.mark.parametrize("wrong", [{"seed": "x"}, {"input_keep_prob": "all"}, {"seed": 0.5}])
def test_arguments_of_another_type_are_a_config_error(host, wrong) -> None:
    with pytest.raises(ValueError, match=r"the config is not a wrapper's: (seed|input_keep_prob)"):
        read(host, {"cell": STOCK[host]} | wrong, ())


ARGUMENTS: dict[str, Any] = {
    "input_keep_prob": 0.5, "output_keep_prob": 0.25, "state_keep_prob": 0.75,
    "variational_recurrent": True, "input_size": 3, "dtype": "float32", "seed": 7,
    "dropout_state_filter_visitor": None, "broadcast_dims": (0,), "deterministic": True,
}  # fmt: skip


@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_a_config_brings_back_each_argument(framework: str, name: str) -> None:
    """Of the wrapper itself: two configs that both lack an argument would be equal."""
    given = {name: ARGUMENTS[name]}
    if framework == "linen":
        cls: Any = fdc.linen.RNNCellDropoutWrapper
        again = cls.from_config(cls(nn.GRUCell(3), **given).get_config())
    else:
        cls, rngs = fdc.nnx.RNNCellDropoutWrapper, nnx.Rngs(0)
        wrapper = cls(nnx.GRUCell(3, 3, rngs=rngs), **given, rngs=rngs)
        again = cls.from_config(wrapper.get_config(), rngs=rngs)
    assert getattr(again, name) == ARGUMENTS[name]
