"""A person at the page, in a real browser."""

import socket
import time


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until(holds, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


class Visitor:
    """A browser window on the page, and what a person does in it."""

    def __init__(self, browser, server):
        self.context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
        self.page = self.context.new_page()
        self.page.set_default_timeout(10_000)
        self.requests, self.dialogs = [], []
        self.context.on("request", lambda request: self.requests.append(request.url))
        self.page.on("dialog", lambda dialog: (self.dialogs.append(dialog.message), dialog.dismiss()))
        self.page.goto(server)
        self.box = self.page.locator("#question textarea")
        self.box.wait_for()

    def ask(self, question):
        self.box.fill(question)
        self.box.press("Enter")

    def see(self, text, count=1):
        """Wait until the chat shows `text`."""
        self.page.locator("#chat").get_by_text(text).nth(count - 1).wait_for(timeout=60_000)

    def settled(self):
        """Wait until no answer is being written."""
        self.page.locator("#question .submit-button").wait_for(timeout=60_000)

    def press(self, label, which=0):
        self.page.get_by_label(label, exact=True).nth(which).click()

    def answer(self, which=-1):
        return self.page.locator("#chat [data-testid=bot]").nth(which).inner_text().strip()

    def questions(self):
        return [text.strip() for text in self.page.locator("#chat [data-testid=user]").all_inner_texts()]

    def close(self):
        self.context.close()
