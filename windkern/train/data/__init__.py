"""Prompts, demonstrations and recorded responses: files, chat templates, token ids."""
