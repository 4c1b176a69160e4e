"""Reuse checks: may this stored KV stand for that computation?"""
