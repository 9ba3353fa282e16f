"""The fields for rendering messages as a prompt."""

import json
from typing import Annotated, Any

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from server.api.fields.wire import Absent, WireModel
from server.text.tokenizer import SET_BY_SERVER, ChatFormat

MAX_TEMPLATE_VARIABLES = 32
MAX_TEMPLATE_CHARACTERS = 2**14


def _template_variables(values: dict[str, Any]) -> dict[str, Any]:
    if len(values) > MAX_TEMPLATE_VARIABLES or len(json.dumps(values)) > MAX_TEMPLATE_CHARACTERS:
        raise ValueError(
            f"there may be at most {MAX_TEMPLATE_VARIABLES} variables and {MAX_TEMPLATE_CHARACTERS} characters of JSON"
        )
    for name in values:
        if name in SET_BY_SERVER or name.endswith("_token"):
            raise ValueError(f"{name} is not for clients to set")
    return values


class ChatFields(WireModel):
    """How messages are rendered as a prompt."""

    add_generation_prompt: bool = Field(True, description="Add the beginning of an answer after the messages.")
    continue_final_message: bool = Field(
        False, description="Leave the last message open, so that the answer continues it. Nothing is added after the messages."
    )
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(_template_variables)] = Field(
        {}, description="Further variables for the checkpoint's chat template, such as enable_thinking."
    )

    chat_template: Absent = None
    documents: Absent = None

    @model_validator(mode="after")
    def _one_end(self) -> "ChatFields":
        if self.continue_final_message and "add_generation_prompt" in self.model_fields_set and self.add_generation_prompt:
            raise PydanticCustomError(
                "continue_final_message", "continue_final_message needs add_generation_prompt to be false"
            )
        return self

    @property
    def chat_format(self) -> ChatFormat:
        return ChatFormat(
            add_generation_prompt=self.add_generation_prompt and not self.continue_final_message,
            continue_final_message=self.continue_final_message,
            variables=self.chat_template_kwargs,
        )
