"""The page's tabs: the chat, models side by side, runs. Beside app.py the only place that knows Gradio."""
