"""Bytes on disk and on the Hub: files, folders, repositories; texts as people may see them. Knows no edit."""
