"""Rewards: of finished clips (``base``, ``video_reward``), and of clips that are still noise (``latent``)."""
