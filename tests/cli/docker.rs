//! Forks bind-mounted into containers of a real Docker engine, where one can be reached.

use super::*;

/// An image that holds nothing but busybox and forkvol; removed with the test.
struct Image(String);

impl Image {
    /// None, and why, where no engine answers.
    fn new(cli: &Cli) -> Option<Image> {
        let answers = Command::new("docker").arg("info").output();
        if !answers.is_ok_and(|output| output.status.success()) {
            eprintln!("left out: no Docker engine answers");
            return None;
        }
        let of_test = cli.dir.path().file_name().unwrap().to_string_lossy();
        let of_test = of_test.trim_start_matches('.').to_lowercase();
        let name = format!("forkvol-test-{of_test}");
        let root = cli.path("image");
        fs::create_dir_all(root.join("bin")).unwrap();
        let busybox = Command::new("sh")
            .args(["-c", "command -v busybox"])
            .output()
            .unwrap();
        let busybox = String::from_utf8(busybox.stdout).unwrap();
        fs::copy(busybox.trim(), root.join("bin/busybox")).expect("the tests need busybox-static");
        // The program itself, with what it is linked to.
        let program = env!("CARGO_BIN_EXE_forkvol");
        fs::copy(program, root.join("bin/forkvol")).unwrap();
        let script = format!(
            "ldd {program} | grep -o '/[^ ]*' | xargs -I@ cp -L --parents @ {}",
            root.display()
        );
        let copied = Command::new("sh").args(["-c", &script]).status();
        assert!(copied.unwrap().success());
        let script = format!("tar c -C {} . | docker import - {name}", root.display());
        assert!(
            Command::new("sh")
                .args(["-c", &script])
                .stdout(Stdio::null())
                .status()
                .unwrap()
                .success()
        );
        Some(Image(name))
    }

    fn run(&self, volume: &str, user: &str, script: &str) -> String {
        let args = [
            "run",
            "--rm",
            "--network",
            "none",
            "--user",
            user,
            "-v",
            volume,
            &self.0,
        ];
        let output = Command::new("docker")
            .args(args)
            .args(["/bin/busybox", "sh", "-c", script])
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        Command::new("docker")
            .args(["rmi", "-f", &self.0])
            .output()
            .unwrap();
    }
}

#[test]
fn a_fork_in_a_docker_container_is_a_folder_like_any_other_for_root_and_for_users() {
    let cli = Cli::new();
    let Some(image) = Image::new(&cli) else {
        return;
    };
    cli.run("v", &cli.path("c"), "echo base >c/base");
    let mount = cli.path("m");
    let fork = cli.ok(&["fork", "v", mount.to_str().unwrap()]);
    fs::set_permissions(&mount, std::os::unix::fs::PermissionsExt::from_mode(0o1777)).unwrap();
    let volume = format!("{}:/cache", mount.display());
    for (user, name) in [("0:0", "root"), ("1234:1234", "user")] {
        let script = format!(
            "/bin/busybox cat /cache/base && echo {name} >/cache/{name} && /bin/busybox stat -c %u /cache/{name}"
        );
        let uid = user.split(':').next().unwrap();
        assert_eq!(image.run(&volume, user, &script), format!("base\n{uid}"));
    }
    cli.ok(&["commit", &fork]);
    assert_eq!(cli.ok(&["cat", "v:user"]), "user");
    assert_eq!(cli.ok(&["cat", "v:root"]), "root");
    cli.check();
}

#[test]
fn a_commit_beside_a_container_that_still_runs_works_and_names_its_holder() {
    let cli = Cli::new();
    let Some(image) = Image::new(&cli) else {
        return;
    };
    let mount = cli.path("m");
    let fork = cli.ok(&["fork", "v", mount.to_str().unwrap()]);
    let volume = format!("{}:/cache", mount.display());
    let args = ["run", "-d", "--network", "none", "-v", &volume, &image.0];
    let started = Command::new("docker")
        .args(args)
        .args([
            "/bin/busybox",
            "sh",
            "-c",
            "echo x >/cache/f; exec /bin/busybox sleep 600 <>/cache/f",
        ])
        .output()
        .unwrap();
    let container = String::from_utf8(started.stdout).unwrap().trim().to_owned();
    while fs::read_to_string(mount.join("f")).unwrap_or_default() != "x\n" {
        std::thread::yield_now();
    }
    let output = cli.call(&["commit", &fork]);
    Command::new("docker")
        .args(["rm", "-f", &container])
        .output()
        .unwrap();
    assert!(output.status.success());
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(words.contains("was still in use by"), "{words}");
    assert_eq!(cli.ok(&["cat", "v:f"]), "x");
}

#[test]
fn an_agent_in_a_container_gives_its_forks_to_containers_of_the_host_s_engine() {
    let cli = Cli::new();
    let Some(image) = Image::new(&cli) else {
        return;
    };
    let sh = |script: &str| {
        let output = Command::new("sh")
            .args(["-ec", script])
            .current_dir(cli.dir.path())
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{script}: {text}");
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    // What the manual says: the folder of the mounts is at the same place inside, and shared with it.
    let mounts = cli.path("mounts").display().to_string();
    sh("mkdir mounts inner && mount --bind mounts mounts && mount --make-shared mounts");
    let agent = sh(&format!(
        "docker run -d --network none --device /dev/fuse --cap-add SYS_ADMIN --security-opt apparmor=unconfined \
         -v $PWD/inner:/var/lib/forkvol -v {mounts}:{mounts}:rshared {} /bin/busybox sleep 600",
        image.0
    ));
    let result = std::panic::catch_unwind(|| {
        let forkvol = |args: &str| sh(&format!("docker exec {agent} /bin/forkvol --quiet {args}"));
        forkvol(&format!(
            "attach --strict --job 1 --mount-root {mounts} -v v -p /work --env-file /env"
        ));
        let volume = format!("{mounts}/1/v:/cache");
        let script = "echo made >/cache/f && /bin/busybox cat /cache/f";
        assert_eq!(image.run(&volume, "0:0", script), "made");
        let inside = sh(&format!("docker exec {agent} /bin/busybox cat /work/f"));
        assert_eq!(inside, "made");
        forkvol("finish --strict --job 1 --status 0");
        assert_eq!(forkvol("cat v:f"), "made");
        assert!(
            !cli.path("mounts/1").exists(),
            "nothing is left on the host"
        );
    });
    sh(&format!("docker rm -f {agent}; umount -l {mounts}"));
    result.unwrap();
}
