"""The pre-receive hook: what git runs between receiving a push and accepting it.

Exit status 0 accepts the push, so the hook ends only after the app is deployed. The commit is unpacked beside `.git`
without touching HEAD (the original detaches it, which a refused push leaves pointing nowhere). Standard output of the
receiver gets the escape that lets a terminal overwrite `remote: `; its errors do not.
"""

PRE_RECEIVE = r"""#!/bin/bash
set -euo pipefail

commit=
while read -r _ new ref; do
  if [[ $ref == refs/heads/master ]]; then commit=$new; fi
done
if [[ -z $commit ]]; then
  echo "The push must include a change to the master branch to be deployed."
  exit 1
fi
if [[ $commit =~ ^0+$ ]]; then
  echo "The master branch cannot be deleted: it is what is deployed."
  exit 1
fi

export GIT_DIR=$PWD
cd ..
export GIT_WORK_TREE=$PWD
unset GIT_QUARANTINE_PATH  # submodules update refs of their own, which git refuses while this is set
rm -f "$GIT_DIR/index"
git read-tree "$commit"
git checkout-index --all --force --quiet
if [[ -f .gitmodules ]]; then
  git submodule --quiet update --init --recursive --force --checkout
fi
unset GIT_DIR GIT_WORK_TREE GIT_OBJECT_DIRECTORY GIT_ALTERNATE_OBJECT_DIRECTORIES

tar --create --exclude-vcs . |
  "${FLYNN_RECEIVER:-flynn-receiver}" "$RECEIVE_APP" "$commit" --meta git=true --meta "git.commit=$commit" |
  sed -u $'s/^/\e[1G\e[K/'
"""
