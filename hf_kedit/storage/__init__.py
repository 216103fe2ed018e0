"""Bytes on disk and on the Hub: files, folders, repositories. Knows no edit."""
