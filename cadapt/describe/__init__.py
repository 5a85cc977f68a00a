"""What models offer for surgery: one in depth (``model``), or all that match a glob in a row each (``listing``).

Nothing is imported here, so that the processes of ``workers`` come up without torch.
"""
