"""Rewards for `lamoe finetune --method grpo`, called as TRL calls them; write your own in the same form."""


def lines_of_verse(completions: list, **columns) -> list[float]:
    """For each completion the share of its lines that are as long as a line of verse, 20 to 60 characters.

    Args:
        completions: texts, or chats whose last message is the answer.
        columns: the other columns of the data, and what else TRL hands over.
    """
    rewards = []
    for completion in completions:
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        lines = [line for line in text.splitlines() if line.strip()]
        rewards.append(sum(20 <= len(line) <= 60 for line in lines) / max(1, len(lines)))
    return rewards
