"""A chat as a generation: rendered through the checkpoint's template, constrained, checked. Two routes end here."""

from collections.abc import Sequence

from server.api.constraints import make_grammar
from server.api.generation import Generation, Prompt, Terms, make_generation
from server.api.prompts import check_text
from server.api.schemas import ChatCompletionRequest, Message
from server.api.services import Services
from server.errors import BadRequest
from server.text.tokenizer import ChatFormat


async def chat_generation(chat: ChatCompletionRequest, answer_id: str, terms: Terms, services: Services) -> Generation:
    """Raises BadRequest naming the field, ContextLengthExceeded."""
    prompt = await _prompt(chat.messages, chat.format, services)
    max_tokens = chat.max_completion_tokens or chat.max_tokens
    grammar = await make_grammar(chat, services)
    return make_generation(answer_id, [prompt], chat, max_tokens, None, terms, grammar, services)


async def _prompt(messages: Sequence[Message], form: ChatFormat, services: Services) -> Prompt:
    """Raises BadRequest when the template refuses the messages."""
    rendered = [{"role": message.role, "content": message.text} for message in messages]
    check_text(sum(len(message["content"]) for message in rendered), "messages", services)
    try:
        return Prompt(await services.tokenizer.encode_chat(rendered, form), "messages")
    except ValueError as error:
        raise BadRequest(str(error), param="messages") from error
