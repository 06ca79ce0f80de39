package finial;

import io.spiffe.provider.SpiffeSslContextFactory;
import io.spiffe.spiffeid.SpiffeId;
import io.spiffe.svid.jwtsvid.JwtSvid;
import io.spiffe.svid.x509svid.X509Svid;
import io.spiffe.svid.x509svid.X509SvidValidator;
import io.spiffe.workloadapi.DefaultWorkloadApiClient;
import io.spiffe.workloadapi.DefaultX509Source;
import io.spiffe.workloadapi.Watcher;
import io.spiffe.workloadapi.WorkloadApiClient;
import io.spiffe.workloadapi.X509Context;
import io.spiffe.workloadapi.X509Source;
import java.io.BufferedReader;
import java.io.IOException;
import java.io.InputStreamReader;
import java.net.InetAddress;
import java.nio.charset.StandardCharsets;
import java.security.cert.X509Certificate;
import java.util.HashSet;
import java.util.Set;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.TimeUnit;
import javax.net.ssl.SSLContext;
import javax.net.ssl.SSLServerSocket;
import javax.net.ssl.SSLSocket;

/** The words of ../README.md, spoken by java-spiffe. */
public final class Client {
    private static final int DEADLINE_SECONDS = 120;

    public static void main(String[] args) throws Exception {
        String word = args.length > 0 ? args[0] : "";
        if (word.equals("check") && args.length == 2) {
            check(args[1]);
        } else if (word.equals("serve") && args.length == 2) {
            serve(SpiffeId.parse(args[1]));
        } else if (word.equals("call") && args.length == 3) {
            call(args[1], SpiffeId.parse(args[2]));
        } else if (word.equals("watch") && args.length == 2) {
            watch(Integer.parseInt(args[1]));
        } else {
            System.err.println("usage: check AUDIENCE | serve ID | call ADDR ID | watch N");
            System.exit(1);
        }
        System.exit(0);
    }

    private static synchronized void say(String... pairs) {
        StringBuilder line = new StringBuilder("{");
        for (int i = 0; i < pairs.length; i += 2) {
            line.append(i == 0 ? "" : ",").append(quote(pairs[i])).append(':').append(quote(pairs[i + 1]));
        }
        System.out.println(line.append('}'));
        System.out.flush();
    }

    private static String quote(String text) {
        return '"' + String.valueOf(text).replace("\\", "\\\\").replace("\"", "\\\"").replace("\n", "\\n") + '"';
    }

    private static void sayX509(X509Svid svid) {
        say("event", "x509", "id", svid.getSpiffeId().toString(), "serial", svid.getLeaf().getSerialNumber().toString(16));
    }

    private static void check(String audience) throws Exception {
        try (WorkloadApiClient client = DefaultWorkloadApiClient.newClient()) {
            X509Context context = client.fetchX509Context();
            X509Svid svid = context.getDefaultSvid();
            X509SvidValidator.verifyChain(svid.getChain(), context.getX509BundleSet());
            sayX509(svid);
            JwtSvid token = client.fetchJwtSvid(audience);
            JwtSvid parsed = JwtSvid.parseAndValidate(token.getToken(), client.fetchJwtBundles(), Set.of(audience));
            client.validateJwtSvid(token.getToken(), audience);
            say("event", "jwt", "id", parsed.getSpiffeId().toString());
        }
    }

    private static SSLContext tls(X509Source source, SpiffeId expected) throws Exception {
        return SpiffeSslContextFactory.getSslContext(SpiffeSslContextFactory.SslContextOptions.builder()
                .x509Source(source)
                .acceptedSpiffeIdsSupplier(() -> Set.of(expected))
                .build());
    }

    private static String peerId(SSLSocket socket) throws Exception {
        X509Certificate leaf = (X509Certificate) socket.getSession().getPeerCertificates()[0];
        for (var name : leaf.getSubjectAlternativeNames()) {
            if (name.get(0).equals(6)) {
                return (String) name.get(1);
            }
        }
        throw new IOException("the peer's certificate has no URI");
    }

    private static String readLine(SSLSocket socket) throws IOException {
        return new BufferedReader(new InputStreamReader(socket.getInputStream(), StandardCharsets.UTF_8)).readLine();
    }

    private static void writeLine(SSLSocket socket, String line) throws IOException {
        socket.getOutputStream().write((line + "\n").getBytes(StandardCharsets.UTF_8));
        socket.getOutputStream().flush();
    }

    private static void serve(SpiffeId expected) throws Exception {
        try (X509Source source = DefaultX509Source.newSource();
                SSLServerSocket listener = (SSLServerSocket) tls(source, expected)
                        .getServerSocketFactory()
                        .createServerSocket(0, 50, InetAddress.getLoopbackAddress())) {
            listener.setNeedClientAuth(true);
            say("event", "listening", "addr", "127.0.0.1:" + listener.getLocalPort());
            while (true) {
                try (SSLSocket socket = (SSLSocket) listener.accept()) {
                    socket.setSoTimeout(10_000);
                    readLine(socket);
                    String peer = peerId(socket);
                    writeLine(socket, source.getX509Svid().getSpiffeId().toString());
                    say("event", "accepted", "peer", peer);
                } catch (IOException e) {
                    say("event", "refused", "error", e.toString());
                }
            }
        }
    }

    private static void call(String addr, SpiffeId expected) throws Exception {
        int colon = addr.lastIndexOf(':');
        try (X509Source source = DefaultX509Source.newSource();
                SSLSocket socket = (SSLSocket) tls(source, expected)
                        .getSocketFactory()
                        .createSocket(addr.substring(0, colon), Integer.parseInt(addr.substring(colon + 1)))) {
            socket.setSoTimeout(10_000);
            writeLine(socket, "hello");
            String line = readLine(socket);
            if (line == null) {
                throw new IOException("the server closed without an answer");
            }
            say("event", "answered", "peer", peerId(socket), "line", line);
        }
    }

    private static void watch(int count) throws Exception {
        Set<String> seen = new HashSet<>();
        CountDownLatch left = new CountDownLatch(count);
        try (WorkloadApiClient client = DefaultWorkloadApiClient.newClient()) {
            client.watchX509Context(new Watcher<>() {
                @Override
                public synchronized void onUpdate(X509Context update) {
                    X509Svid svid = update.getDefaultSvid();
                    if (left.getCount() > 0 && seen.add(svid.getLeaf().getSerialNumber().toString(16))) {
                        sayX509(svid);
                        left.countDown();
                    }
                }

                @Override
                public void onError(Throwable e) {
                    System.err.println(e);
                }
            });
            if (!left.await(DEADLINE_SECONDS, TimeUnit.SECONDS)) {
                throw new IllegalStateException("saw only " + seen.size() + " of " + count);
            }
        }
    }
}
