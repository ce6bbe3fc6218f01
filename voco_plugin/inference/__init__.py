"""What a user asks of a compressed image: the two-stage methods of a model, prompts, answers,
conversations.
"""
