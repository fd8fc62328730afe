"""Texts as a model reads them: tokens, lengths, chat forms, and text that the base itself writes."""
