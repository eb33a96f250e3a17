import type { Lab, Machine } from "../lab/lab.ts";

/** Something that the mesh says anew, to see when it arrives; disposing of it takes it back. */
export interface News extends AsyncDisposable {
  /** Does a machine know it? Its name resolves there, within a second, by the table that istiod has sent. */
  knownTo(machine: Machine): Promise<boolean>;
}

/** A new Service of namespace default, without endpoints. */
export async function tellNews(lab: Lab, name: string): Promise<News> {
  await lab.apply(
    `apiVersion: v1\nkind: Service\nmetadata: {name: ${name}, namespace: default}\nspec: {ports: [{name: http, port: 80}]}\n`,
  );
  return {
    async knownTo(machine) {
      const { code } = await machine.exec(`timeout 1 getent ahostsv4 ${name}.default.svc.cluster.local`, {
        allowFail: true,
      });
      return code === 0;
    },
    async [Symbol.asyncDispose]() {
      await lab.kubectl(["delete", "service", "-n", "default", name, "--ignore-not-found"]);
    },
  };
}
