"""The prompts of /v1/completions as token ids, and their echo."""

from server.api.answers.generation import Prompt, make_echo
from server.api.fields.completions import CompletionRequest
from server.api.requests.sampling import check_ids, check_length, too_long
from server.text.tokenizer import Tokenizer


async def text_prompt(body: CompletionRequest, place: int, tokenizer: Tokenizer, max_model_len: int, vocab_size: int) -> Prompt:
    """Encode prompt number `place`, and make its echo if that is asked for. Raises BadRequest, ContextLengthExceeded."""
    param = f"prompt[{place}]" if len(body.prompt) > 1 else "prompt"
    prompt = body.prompt[place]
    if isinstance(prompt, str):
        check_text(len(prompt), param, tokenizer, max_model_len)
        ids = await tokenizer.encode(prompt, body.add_special_tokens)
    else:
        ids = prompt
    if not body.echo:
        return Prompt(ids, param)
    check_length(ids, body.max_tokens, max_model_len, param)  # before time is spent on each token
    check_ids(ids, vocab_size, param)
    return Prompt(ids, param, await tokenizer.run(lambda: make_echo(ids, tokenizer), len(ids)))


def check_text(characters: int, param: str, tokenizer: Tokenizer, max_model_len: int) -> None:
    """Refuse a text that is certainly too long, before time is spent on encoding it. Raises ContextLengthExceeded."""
    if characters > tokenizer.most_characters(max_model_len):
        raise too_long(f"{characters} characters", max_model_len, param)
