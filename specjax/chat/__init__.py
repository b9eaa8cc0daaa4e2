"""Who answers, what is asked, and a conversation in the terminal: what `specjax generate` and `chat` share."""
