"""Makes a generation from a chat request, for /v1/chat/completions and for /v1/responses."""

from collections.abc import Sequence
from dataclasses import replace

from server.api.answers.generation import Generation, GenerationParts, Prompt, Terms, make_generation
from server.api.fields.completions import ChatCompletionRequest, Message
from server.api.requests.constraints import make_grammar
from server.api.requests.prompts import check_text
from server.api.requests.tools import use_tools
from server.errors import BadRequest
from server.text.language import Language
from server.text.tokenizer import ChatFormat
from server.text.tool_dialects import Function
from server.text.tool_prompt import as_plain_messages, for_template


async def chat_generation(
    chat: ChatCompletionRequest, answer_id: str, terms: Terms, language: Language, parts: GenerationParts
) -> Generation:
    """Render the messages with the checkpoint's template, and make the generation with its constraint and tools.

    Raises ContextLengthExceeded, and BadRequest with the wrong field's name.
    """
    tools = use_tools(chat, language.tool_dialect, language.grammars)
    characters = sum(message.characters for message in chat.messages)
    check_text(characters, "messages", language.tokenizer, parts.engine.limits.max_model_len)
    prompt = Prompt(await chat_tokens(chat.messages, tools.functions, chat.chat_format, language), "messages")
    max_tokens = chat.token_limit
    grammar = await make_grammar(chat, language.grammars, tools)
    return make_generation(answer_id, [prompt], chat, max_tokens, None, terms, grammar, parts, tools.parser)


async def chat_tokens(
    messages: Sequence[Message], functions: Sequence[Function], form: ChatFormat, language: Language
) -> list[int]:
    """The prompt of a conversation as token ids. Raises BadRequest if the template refuses the messages."""
    said = [message.to_dict() for message in messages]
    if language.tokenizer.template_knows_tools:
        shaped, tools = for_template(said), [function.to_dict() for function in functions] or None
    else:
        shaped, tools = as_plain_messages(said, functions, language.tool_dialect), None
    try:
        return await language.tokenizer.encode_chat(shaped, replace(form, tools=tools))
    except ValueError as error:
        raise BadRequest(str(error), param="messages") from error
