"""OpenAI's routes: their requests, their answers, tools and reasoning."""
