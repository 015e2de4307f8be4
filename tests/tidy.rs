//! The shape of the source: what ARCHITECTURE.md says of it.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// All files of a folder with this ending, with what they hold.
fn files(folder: &str, ending: &str) -> Vec<(PathBuf, String)> {
    let mut folders = vec![root().join(folder)];
    let mut out = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == ending) {
                let text = fs::read_to_string(&path).unwrap();
                out.push((path, text));
            }
        }
    }
    assert!(!out.is_empty(), "there is nothing in {folder}");
    out
}

/// The module at the top under which a file of `src` lies.
fn module(path: &Path) -> String {
    let inside = path.strip_prefix(root().join("src")).unwrap();
    let first = inside.components().next().unwrap().as_os_str();
    first.to_str().unwrap().trim_end_matches(".rs").to_owned()
}

/// The modules of the code map, from the top.
fn code_map() -> Vec<String> {
    let text = fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let (_, map) = text.split_once("## Code map").unwrap();
    let rows = map.lines().filter(|line| line.starts_with("| `"));
    rows.take_while(|row| !row.starts_with("##"))
        .flat_map(|row| row.split('|').nth(1).unwrap().split(','))
        .map(|name| name.trim().trim_matches('`').to_owned())
        .collect()
}

#[test]
fn imports_go_down_the_code_map_only() {
    let map = code_map();
    let place = |name: &str| {
        let found = map.iter().position(|known| known == name);
        found.unwrap_or_else(|| panic!("{name} is not in the code map"))
    };
    let mut wrong = Vec::new();
    for (path, text) in files("src", "rs") {
        let own = module(&path);
        if own == "lib" {
            continue;
        }
        for (_, rest) in text
            .match_indices("crate::")
            .map(|(at, word)| (at, &text[at + word.len()..]))
        {
            let name: String = rest
                .chars()
                .take_while(|c| c.is_ascii_lowercase() || *c == '_')
                .collect();
            if map.contains(&name) && place(&name) < place(&own) {
                wrong.push(format!("{} imports {name}", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn each_dependency_that_has_a_home_is_used_there_alone() {
    let homes = [
        ("rocksdb", "store"),
        ("fuser", "mount"),
        ("libc", "sys"),
        ("clap", "cli"),
        ("indicatif", "cli"),
        ("saphyr_parser", "cli"),
        ("ignore", "volume"),
    ];
    let mut wrong = Vec::new();
    for (path, text) in files("src", "rs") {
        for (name, home) in homes {
            let used =
                text.contains(&format!("use {name}::")) || text.contains(&format!(" {name}::"));
            if used && module(&path) != home {
                wrong.push(format!("{} uses {name}", path.display()));
            }
        }
        let unsafe_code = text.contains("unsafe {") || text.contains("unsafe fn");
        if unsafe_code && module(&path) != "sys" {
            wrong.push(format!("{} has unsafe code", path.display()));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn every_link_of_the_documents_leads_somewhere() {
    let mut documents = files("docs", "md");
    for name in ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"] {
        let path = root().join(name);
        let text = fs::read_to_string(&path).unwrap();
        documents.push((path, text));
    }
    for (path, text) in documents {
        for link in text
            .split("](")
            .skip(1)
            .filter_map(|rest| rest.split(')').next())
        {
            let target = link.split('#').next().unwrap();
            if target.is_empty() || target.contains("://") {
                continue;
            }
            let there = path.parent().unwrap().join(target).exists();
            assert!(there, "{}: {link}", path.display());
        }
    }
}
