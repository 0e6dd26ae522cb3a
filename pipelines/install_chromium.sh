#!/bin/sh
# Installs a headless Chromium from the distribution, for the page tests and the screenshots of the docs.
# Says what to do where it cannot; fails only under CI, where those tests have to run.
set -eu

for name in chromium-headless-shell chromium chromium-browser google-chrome google-chrome-stable; do
    if command -v "$name" > /dev/null; then exit 0; fi
done

if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends chromium-headless-shell fonts-dejavu-core > /dev/null ||
        apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core > /dev/null
    exit 0
fi

echo "No Chromium here, so tests/teacher_cache/pages/test_pages.py is skipped. To run it, install one:" >&2
echo "  Debian:         sudo apt-get install chromium-headless-shell fonts-dejavu-core" >&2
echo "  other systems:  any Chromium or Google Chrome on the PATH" >&2
[ "${CI:-}" != true ]
