"""Nodes: their schema, their results, and what they answer to the host."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, final

from ._types import Input, Output


class Hidden(str, Enum):
    """What a node may ask the host for beside its inputs."""

    unique_id = "UNIQUE_ID"
    prompt = "PROMPT"
    extra_pnginfo = "EXTRA_PNGINFO"
    dynprompt = "DYNPROMPT"
    auth_token_comfy_org = "AUTH_TOKEN_COMFY_ORG"
    api_key_comfy_org = "API_KEY_COMFY_ORG"


@dataclass(frozen=True)
class HiddenHolder:
    """The hidden values during one execution."""

    unique_id: Any = None
    prompt: Any = None
    extra_pnginfo: Any = None
    dynprompt: Any = None
    auth_token_comfy_org: Any = None
    api_key_comfy_org: Any = None


class UIOutput:
    """A result for the user interface."""

    def as_dict(self) -> dict[str, Any]:
        """What is sent to the user interface."""
        raise AssertionError("as_dict is the subclass's")


class NodeOutput:
    """The results of one execution in the order of the outputs, and what the user interface shows."""

    def __init__(
        self,
        *args: Any,
        ui: UIOutput | dict[str, Any] | None = None,
        expand: dict[str, Any] | None = None,
        block_execution: str | None = None,
    ) -> None:
        self.args = args
        self.ui = ui
        self.expand = expand
        self.block_execution = block_execution

    @property
    def result(self) -> tuple[Any, ...] | None:
        """The results; None when there are none."""
        return self.args or None

    def __getitem__(self, index: int) -> Any:
        return self.args[index]


@dataclass
class Schema:
    """A node's declaration, with the fields of ComfyUI 0.8.0."""

    node_id: str
    display_name: str | None = None
    category: str = "sd"
    inputs: list[Input] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    hidden: list[Hidden] = field(default_factory=list)
    description: str = ""
    is_input_list: bool = False
    is_output_node: bool = False
    is_deprecated: bool = False
    is_experimental: bool = False
    is_api_node: bool = False
    not_idempotent: bool = False
    enable_expand: bool = False

    def finalize(self) -> None:
        """Add what an output node is always given, and name the outputs without an id."""
        if self.is_output_node:
            self.hidden += [one for one in (Hidden.prompt, Hidden.extra_pnginfo) if one not in self.hidden]
        for index, output in enumerate(self.outputs):
            output.id = output.id or f"_{index}_{output.io_type}_"

    def validate(self) -> None:
        """Refuse an id that two inputs or two outputs share.

        Raises:
            ValueError: naming them.
        """
        for kind, sockets in (("Input", self.inputs), ("Output", self.outputs)):
            ids = [str(socket.id) for socket in sockets]
            if twice := sorted({one for one in ids if ids.count(one) > 1}):
                raise ValueError(f"{kind} ids must be unique, but {twice} are not.")

    def object_info(self) -> dict[str, Any]:
        """The node as the host's ``object_info`` describes it, without the module it came from."""
        sockets: dict[str, dict[str, Any]] = {"required": {}}
        for one in self.inputs:
            group = sockets.setdefault("optional" if one.optional else "required", {})
            group[one.id] = (one.get_io_type(), one.as_dict())
        for hidden in self.hidden:
            sockets.setdefault("hidden", {})[hidden.name] = (hidden.value,)
        return {
            "input": sockets,
            "input_order": {group: list(members) for group, members in sockets.items()},
            "output": [one.io_type for one in self.outputs],
            "output_is_list": [one.is_output_list for one in self.outputs],
            "output_name": [one.display_name or one.io_type for one in self.outputs],
            "output_tooltips": [one.tooltip or None for one in self.outputs],
            "output_matchtypes": None,
            "name": self.node_id,
            "display_name": self.display_name,
            "description": self.description,
            "category": self.category,
            "output_node": self.is_output_node,
            "deprecated": self.is_deprecated,
            "experimental": self.is_experimental,
            "api_node": self.is_api_node,
        }


class ComfyNode:
    """A node: class methods only, and no state of its own."""

    RELATIVE_PYTHON_MODULE: str | None = None
    SCHEMA: Schema | None = None
    # Set while the node runs.
    hidden: HiddenHolder = None  # type: ignore[assignment]

    @classmethod
    def define_schema(cls) -> Schema:
        """The node's declaration; every node has its own."""
        raise AssertionError(f"{cls.__name__} has no define_schema")

    @classmethod
    def execute(cls, *args: Any, **inputs: Any) -> NodeOutput:
        """One execution; every node has its own."""
        raise AssertionError(f"{cls.__name__} has no execute")

    @final
    @classmethod
    def GET_SCHEMA(cls) -> Schema:
        """The declaration, completed and checked."""
        for method in ("define_schema", "execute"):
            if getattr(cls, method).__func__ is getattr(ComfyNode, method).__func__:
                raise TypeError(f"No {method} function was defined for node class {cls.__name__}.")
        schema = cls.define_schema()
        schema.finalize()
        schema.validate()
        cls.SCHEMA = schema
        return schema

    @final
    @classmethod
    def INPUT_TYPES(cls) -> dict[str, dict[str, Any]]:
        """The inputs as ``object_info`` describes them."""
        types: dict[str, dict[str, Any]] = cls.GET_NODE_INFO_V1()["input"]
        return types

    @final
    @classmethod
    def GET_NODE_INFO_V1(cls) -> dict[str, Any]:
        """The node as the host's ``object_info`` describes it."""
        return cls.GET_SCHEMA().object_info() | {"python_module": cls.RELATIVE_PYTHON_MODULE}

    @final
    @classmethod
    def PREPARE_CLASS_CLONE(cls, v3_data: dict[str, Any] | None) -> type[ComfyNode]:
        """A copy of the class for one execution, with its hidden values."""
        given = v3_data["hidden_inputs"] if v3_data else {}
        holder = HiddenHolder(**{one.name: given.get(one) for one in Hidden})
        return type(f"{cls.__name__}Clone", (cls,), {"hidden": holder})

    @final
    @classmethod
    def EXECUTE_NORMALIZED(cls, *args: Any, **inputs: Any) -> NodeOutput:
        """Run ``execute`` and make a :class:`NodeOutput` of what it returns.

        Raises:
            TypeError: it returned something else than a NodeOutput, a tuple or None, or it is asynchronous.
            ValueError: it expands the graph though its schema does not say so.
        """
        if inspect.iscoroutinefunction(cls.execute):
            raise TypeError(f"{cls.__name__}.execute is asynchronous; this stand-in runs ordinary functions only")
        answer = cls.execute(*args, **inputs)
        if isinstance(answer, tuple) or answer is None:
            answer = NodeOutput(*(answer or ()))
        if not isinstance(answer, NodeOutput):
            raise TypeError(f"Invalid return type from node: {type(answer)}")
        if answer.expand is not None and not cls.GET_SCHEMA().enable_expand:
            raise ValueError(f"Node {cls.__name__} is not expandable, but its output holds expand")
        return answer
