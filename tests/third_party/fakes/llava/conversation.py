"""One template."""

import copy


class Conversation:
    """Messages of two roles."""

    roles = ("USER", "ASSISTANT")

    def __init__(self):
        self.messages = []

    def copy(self):
        """Another with the same messages."""
        return copy.deepcopy(self)

    def append_message(self, role, message):
        """Adds one; None is the place of the answer."""
        self.messages.append((role, message))

    def get_prompt(self):
        """As text."""
        return " ".join(f"{role}: {m}" if m else f"{role}:" for role, m in self.messages)


conv_templates = {"llava_v1": Conversation()}
