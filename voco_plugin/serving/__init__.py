"""Answers for many people from one model: what a page, a terminal and a server stand on.

Reading order: `token_stream` (a generation whose text comes piece by piece and can be stopped),
`picture_chat` (one person's conversation about images, and what each step cost), `page_words` (those costs
as tables), `page` (the Gradio page).

It imports from every room above it in the table of docs/architecture.md; only the command line imports it.
Nothing is imported here: Gradio loads with `page` alone.
"""
