"""The prompts of /v1/completions as token ids, and their echo."""

from server.api.answers.generation import Prompt, make_echo
from server.api.fields.completions import CompletionRequest
from server.api.requests.sampling import check_ids, check_length, too_long
from server.api.services import Services


async def text_prompt(body: CompletionRequest, place: int, services: Services) -> Prompt:
    """Encode one of the prompts, and lay out its echo when that is asked for."""
    param = f"prompt[{place}]" if len(body.prompt) > 1 else "prompt"
    prompt, tokenizer = body.prompt[place], services.tokenizer
    if isinstance(prompt, str):
        check_text(len(prompt), param, services)
        ids = await tokenizer.encode(prompt, body.add_special_tokens)
    else:
        ids = prompt
    if not body.echo:
        return Prompt(ids, param)
    limits = services.engine.limits
    check_length(ids, body.max_tokens, limits.max_model_len, param)  # before time is spent on each token
    check_ids(ids, limits.vocab_size, param)
    return Prompt(ids, param, await tokenizer.run(lambda: make_echo(ids, tokenizer), len(ids)))


def check_text(characters: int, param: str, services: Services) -> None:
    """Refuse what is hopelessly too long before any time is spent on encoding it."""
    max_model_len = services.engine.limits.max_model_len
    if characters > services.tokenizer.most_characters(max_model_len):
        raise too_long(f"{characters} characters", max_model_len, param)
