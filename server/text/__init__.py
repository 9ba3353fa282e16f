"""Text and tokens: tokenizer, chat prompts, detokenizer, grammars, tool calls."""
