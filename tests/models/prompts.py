"""Fifty varied prompts: chat, plain text, code, other languages, from one token to about 250."""

from __future__ import annotations

PROMPTS = [
    "The",
    "\n",
    "What is the capital of France?",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n: int) -> int:\n    ",
    "import numpy as np\n\ndef softmax(x):\n    # numerically stable\n",
    "SELECT name, COUNT(*) FROM orders WHERE",
    '{"name": "Ada", "born": 1815, "occupation": ',
    "1, 1, 2, 3, 5, 8, 13, 21,",
    "Q: What is 17 + 25?\nA:",
    "Translate to German: The weather is nice today.\n",
    "Die Hauptstadt von Frankreich ist",
    "La capitale de la France est",
    "El perro corre por el parque porque",
    "東京は日本の",
    "Привет! Как",
    "🙂🙂🙂",
    "# Recipe: Tomato soup\n\n## Ingredients\n- 1 kg tomatoes\n-",
    "Dear Sir or Madam,\n\nI am writing to complain about",
    "The ships came in at dawn. Nobody had expected them before the end of the month, and the harbour was not ready: "
    "no berths, no pilots, and the cranes still in pieces on the quay. The master of the first ship sent a boat ashore "
    "with a letter for the governor, who read it twice, folded it, and asked for his hat. By noon the whole town knew "
    "that the war was over. What nobody knew yet was",
    "To be, or not to be, that is the question:",
    "Write a haiku about autumn.\n",
    "<html>\n<head>\n<title>",
    "for (int i = 0; i < n; i++) {\n",
    "The mitochondria is the powerhouse of",
    "Breaking news: scientists have discovered",
    "List five uses of a paper clip:\n1.",
    "Roses are red,\nViolets are blue,\n",
    "If x^2 - 5x + 6 = 0, then x =",
    "The quick brown fox jumps over the lazy dog. " * 25,
    "In 1969, the Apollo 11 mission",
    "A B C D E F G H I J K L M N O P",
    "Summary: The meeting covered the budget, the new hires and the move to a larger office.\nAction items:",
    "User: my printer does not print\nSupport:",
    "$ ls -la\ntotal 48\ndrwxr-xr-x",
    "The difference between a process and a thread is that",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "Photosynthesis converts carbon dioxide and water into",
    "Chapter 1\n\nIt was a dark and stormy night;",
    "The following is a list of prime numbers: 2, 3, 5, 7, 11,",
    "fn main() {\n    let mut total = 0;\n",
    "My favourite book is",
    "Paris, London, Berlin, Madrid,",
    "According to the theory of relativity,",
    "How do I boil an egg?",
    "Give me three tips for sleeping better.",
    "Who wrote Romeo and Juliet?",
    "Explain recursion to a child.",
    "The river ran through the valley, past the mill, under the old stone bridge and out to the plain, where " * 9,
    "x = [i for i in range(10)]\nprint(sum(x))\n# prints " * 7,
]
CHAT = range(40, 48)  # of these, asked through the model's chat template


def chat(text: str) -> str:
    """SmolLM2's chat template around one question."""
    system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    return f"{system}<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def prompt_texts() -> list[str]:
    return [chat(text) if i in CHAT else text for i, text in enumerate(PROMPTS)]
