"""The fields for a constraint on the text, as OpenAI, vLLM, SGLang, TGI, llama.cpp and Ollama name them.

Each field is enforced or refused by name. Text that ignores the constraint would be worse than an error.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from server.api.fields.wire import Absent, Alternatives, JsonSchema, Off, Regex, WireModel, only, or_else

MAX_GRAMMAR_CHARACTERS = 2**15

GrammarText = Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_CHARACTERS)]


class ConstraintModel(WireModel):
    """A part of a constraint. Unknown members are refused."""

    model_config = ConfigDict(extra="forbid")


class JsonSchemaFormat(ConstraintModel):
    name: str | None = None
    description: str | None = None
    schema_: JsonSchema = Field({}, alias="schema")
    strict: bool = True


class ResponseFormat(ConstraintModel):
    """`text`: no constraint. `json_object`: any JSON object, or one that fits `schema`. `json_schema`: JSON that fits it."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None
    schema_: JsonSchema | None = Field(None, alias="schema", description="For json_object only, as in llama.cpp.")

    @model_validator(mode="after")
    def _schema_is_there(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError("json_schema", "json_schema belongs to the type json_schema, and to no other")
        if self.schema_ is not None and self.type != "json_object":
            raise PydanticCustomError("json_schema", "schema belongs to the type json_object, and to no other")
        return self


class StructuredOutputs(ConstraintModel):
    """One constraint on the text, in vLLM's form."""

    json_: JsonSchema | None = Field(None, alias="json")
    json_object: bool = False
    regex: Regex | None = None
    choice: Alternatives | None = None
    grammar: GrammarText | None = Field(None, description="In GBNF, or in llguidance's dialect of Lark.")

    disable_any_whitespace: bool = Field(False, description="No effect. JSON never has white space between its parts here.")
    disable_fallback: bool = False
    disable_additional_properties: Off = False
    whitespace_pattern: Absent = None
    structural_tag: Absent = None


class TypedGrammar(ConstraintModel):
    """TGI's form of a constraint."""

    type: Literal["json", "regex"]
    value: JsonSchema | Regex

    @model_validator(mode="after")
    def _value_fits(self) -> "TypedGrammar":
        if isinstance(self.value, str) != (self.type == "regex"):
            raise PydanticCustomError("grammar", "value must be a schema for json and a text for regex")
        return self


def _as_schema(value: object) -> object:
    """Ollama's "json" means any JSON object. Its empty text means no constraint."""
    return {"json": {}, "": None}.get(value, value) if isinstance(value, str) else value


class ConstraintFields(WireModel):
    """At most one of these fields may ask for a constraint."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonSchema | None = None
    guided_json_object: bool = False
    guided_regex: Regex | None = None
    guided_choice: Alternatives | None = None
    guided_grammar: GrammarText | None = None
    grammar: (
        Annotated[
            GrammarText | TypedGrammar, or_else("must be a grammar as text, or an object of a type, json or regex, and a value")
        ]
        | None
    ) = Field(None, description="A grammar in GBNF, or in llguidance's dialect of Lark; or TGI's object.")
    ebnf: GrammarText | None = Field(None, description="The same as grammar.")
    regex: Regex | None = None
    json_schema: JsonSchema | None = None
    format: Annotated[
        JsonSchema | None, BeforeValidator(_as_schema, json_schema_input_type=Literal["json"] | dict[str, Any])
    ] = None

    # The choice of a library makes no difference to the text.
    guided_decoding_backend: str | None = None

    guided_whitespace_pattern: Absent = None
    guided_decoding: Absent = None
    guided_options_request: Absent = None
    structural_tag: Absent = None
    stop_regex: Absent = None
    grammar_lazy: Off = False
    grammar_triggers: Annotated[Any, only([])] = []
    choice: Absent = None
    json_: Absent = Field(None, alias="json")
    json_object: Off = False
    response_schema: Absent = None
    output_format: Absent = None
    nvext: Absent = None
    # The official client merges this into the body before it sends it.
    extra_body: Absent = None
