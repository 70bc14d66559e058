"""Tokens in, micro-batches out: indexed datasets, shuffled sources, blends, and their explicit position.

Modules, each standing on the ones before: ``permutation``, ``indexed`` (files), ``source`` (an endless stream of
windows), ``blend`` (whose turn it is), ``batch`` (labels, masks, documents), ``training`` (what the loop calls).
``tokenizer`` turns text into token ids and back.
"""
