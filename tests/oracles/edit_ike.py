"""IKE (Zheng et al., 2023, section 3): what stands before a prompt, written out, and the cosine of texts' words."""

import math


def context(examples, question, answer, prompt):
    """Examples, each (question, answer, prompt, its answer), then the new fact and the prompt."""
    found = ""
    for fact, told, asked, said in examples:
        found += f"New Fact: {fact} {told}.\nPrompt: {asked} {said}\n\n"
    return f"{found}New Fact: {question} {answer}.\nPrompt: {prompt}"


def pieces(text):
    """Words in bounds, and all their triples of letters."""
    words = [f"<{word}>" for word in "".join(c if c.isalnum() else " " for c in text.lower()).split()]
    return words + [word[at : at + 3] for word in words for at in range(len(word) - 2)]


def alike(one, other, texts):
    """The cosine of tf-idf: count times 1 + log((1 + N) / (1 + n)); pieces of no text count nothing."""

    def weighed(text):
        found = {}
        for piece in pieces(text):
            holders = sum(piece in pieces(its) for its in texts)
            if holders:
                found[piece] = found.get(piece, 0) + 1 + math.log((1 + len(texts)) / (1 + holders))
        return found

    a, b = weighed(one), weighed(other)
    length = math.sqrt(sum(x * x for x in a.values()) * sum(x * x for x in b.values()))
    return sum(a[piece] * b.get(piece, 0) for piece in a) / length if length else 0.0
