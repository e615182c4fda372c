# Sourced by test.sh: what the tests of the report's page need and pip has not, a headless Chromium and axe-core.
# Both are test tools only. What cannot be had is said here, and again by pytest, which skips those tests.

AXE_VERSION=4.10.3 # MPL-2.0; the test's own default path has it too
AXE_SHA256=0f2b4d7dcdf7d1219df8d1959ad68e565f51d14c3f0d88bb71cd59abeb956292
AXE_FILE=.pytest_cache/axe-core-$AXE_VERSION/axe.min.js

page_browser() {
    find_chromium > /dev/null || install_chromium
    [[ -s $AXE_FILE || -n ${TUNESCOPE_AXE:-} ]] || fetch_axe
}

find_chromium() {
    command -v chromium || command -v chromium-browser || command -v google-chrome || command -v google-chrome-stable
}

# From Debian's packages, as root or by sudo that asks nothing. Ubuntu's package of this name is a snap's installer.
install_chromium() {
    local as_root=() options=(-qq -y -o Acquire::Retries=0 -o Acquire::http::Timeout=20 -o DPkg::Lock::Timeout=30)
    if [[ -n ${TUNESCOPE_NO_APT:-} ]]; then
        skipped "there is no Chromium, and TUNESCOPE_NO_APT is set"
        return
    fi
    if ! command -v apt-get > /dev/null || ! grep -qx 'ID=debian' /etc/os-release 2> /dev/null; then
        skipped "there is no Chromium, and this is no Debian with apt-get"
        return
    fi
    if ((EUID)); then
        as_root=(sudo -n)
        if ! sudo -n true 2> /dev/null; then
            skipped "there is no Chromium, and only root may install it"
            return
        fi
    fi
    echo "test.sh: installing Debian's chromium for the tests of the report's page (TUNESCOPE_NO_APT=1 keeps it out)" >&2
    # Downloading has the shorter limit: a package that is being unpacked is better left to end.
    if "${as_root[@]}" timeout 60 apt-get "${options[@]}" update > /dev/null 2>&1 &&
        "${as_root[@]}" timeout 180 env DEBIAN_FRONTEND=noninteractive apt-get "${options[@]}" install --download-only \
            --no-install-recommends chromium fonts-dejavu-core > /dev/null 2>&1 &&
        "${as_root[@]}" timeout 300 env DEBIAN_FRONTEND=noninteractive apt-get "${options[@]}" install \
            --no-install-recommends chromium fonts-dejavu-core > /dev/null 2>&1 && find_chromium > /dev/null; then
        return
    fi
    skipped "there is no Chromium, and apt-get could not install it (no network, a lock, or a time limit)"
}

# npm's own archive, of one version and known content; nothing of it is run here.
fetch_axe() {
    local folder archive
    if ! command -v npm > /dev/null; then
        skipped "there is no npm to fetch axe-core $AXE_VERSION with"
        return
    fi
    folder=$(mktemp -d)
    archive=$folder/axe-core-$AXE_VERSION.tgz
    if timeout 60 npm pack --silent --pack-destination "$folder" "axe-core@$AXE_VERSION" > /dev/null 2>&1 &&
        echo "$AXE_SHA256  $archive" | sha256sum --check --status &&
        mkdir -p "$(dirname "$AXE_FILE")" &&
        tar -xzf "$archive" -C "$folder" package/axe.min.js && mv "$folder/package/axe.min.js" "$AXE_FILE"; then
        rm -rf "$folder"
        return
    fi
    rm -rf "$folder"
    skipped "npm could not fetch axe-core $AXE_VERSION, or fetched something else"
}

skipped() {
    echo "test.sh: $1. TESTS OF THE REPORT'S PAGE IN A BROWSER ARE SKIPPED, in part or all; see docs/report.md." >&2
}
